"""A teacher that is ended before it serves ends with 0 and leaves nothing behind, wherever it is.

The moments are found by order: an import that stops and says so, a line of the log, a child that is
there. Run: pytest tests/faults/test_signal_at_start.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.live_server import LiveServer
from tests.faults.test_lifecycle import assert_gone
from tests.teacher.engine.engine_models import write_tiny_model

pytestmark = pytest.mark.e2e

UNTIL_S = 120.0
"""A bound for what must come; no test is about how soon."""
HOOK = """
import atexit, os, sys, time


def stop(reached, go):
    open(reached, "w").close()
    while not os.path.exists(go):
        time.sleep(0.02)


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("STOP_AT"):
            stop(os.environ["REACHED"], os.environ["GO"])


sys.meta_path.insert(0, Finder())
if os.environ.get("STOP_AT") == "exit":
    atexit.register(stop, os.environ["REACHED"], os.environ["GO"])
"""


@pytest.fixture
def stop_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Has every Python that is started from now on stop at the import of a module, or at its exit;
    the file it returns is there once it has."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)

    def stop(name: str) -> Path:
        path = os.pathsep.join([str(tmp_path / "hook"), *filter(None, [os.getenv("PYTHONPATH")])])
        for variable, value in {
            "PYTHONPATH": path,
            "STOP_AT": name,
            "REACHED": str(tmp_path / "reached"),
            "GO": str(tmp_path / "go"),
        }.items():
            monkeypatch.setenv(variable, value)
        return tmp_path / "reached"

    return stop


def until(true: Callable[[], object], server: LiveServer) -> None:
    give_up = time.monotonic() + UNTIL_S
    while not true():
        assert server.process.poll() is None, server.output
        assert time.monotonic() < give_up, server.output
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "module",
    ["argparse", "pydantic_settings", "grpc", "fastapi", "teacher_server.process.app", "uvloop"],
)
def test_a_signal_while_it_imports(
    module: str, number: int, stop_at: Callable[[str], Path], tmp_path: Path
) -> None:
    reached = stop_at(module)
    server = LiveServer(tmp_path)
    try:
        until(reached.exists, server)
        server.send_signal(number)
        assert server.exit_code(UNTIL_S) == 0
        assert server.output == f"teacher-server: signal {int(number)} before it served: ended\n"
    finally:
        server.end()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_signal_while_the_checkpoint_is_read(
    loop: str, stop_at: Callable[[str], Path], tmp_path: Path
) -> None:
    reached = stop_at("teacher_server.engine.hf_engine")
    server = LiveServer(tmp_path, "--engine", "hf", "--model", "m", "--event-loop", loop)
    try:
        until(reached.exists, server)
        server.send_signal(signal.SIGTERM)
        assert server.exit_code(UNTIL_S) == 0
    finally:
        server.end()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_signal_while_the_engine_is_tested(loop: str, tmp_path: Path) -> None:
    server = LiveServer(tmp_path, "--fake-latency-s", "3600", "--event-loop", loop)
    try:
        until(lambda: "testing the engine" in server.output, server)
        server.send_signal(signal.SIGTERM)
        assert server.exit_code(UNTIL_S) == 0
        assert not server.ready_file.exists()
    finally:
        server.end()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_signal_after_the_drain_changes_nothing(
    loop: str, stop_at: Callable[[str], Path], tmp_path: Path
) -> None:
    reached = stop_at("exit")
    server = LiveServer(tmp_path, "--event-loop", loop)
    try:
        server.wait_until_ready()
        server.send_signal(signal.SIGTERM)
        until(reached.exists, server)
        for number in (signal.SIGTERM, signal.SIGINT):
            server.send_signal(number)
        (tmp_path / "go").touch()
        assert server.exit_code(UNTIL_S) == 0
    finally:
        server.end()


@pytest.mark.vllm
@pytest.mark.parametrize("moment", ["its engine is there", "testing the engine"])
def test_a_signal_while_vllm_starts_takes_its_engine_along(moment: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    flags = ["--engine", "vllm", "--model", str(model), "--max-context", "192", "--max-k", "16"]
    flags += ["--kv-cache-gib", "0.05", "--enforce-eager", "--cpu-cores", "0"]
    server = LiveServer(tmp_path, *flags)
    engine: list[int] = []

    def begun() -> bool:
        engine[:] = spawned(server.process.pid)
        return bool(engine) and (moment == "its engine is there" or moment in server.output)

    try:
        until(begun, server)
        server.send_signal(signal.SIGTERM)
        assert server.exit_code(UNTIL_S) == 0
        for pid in engine:
            assert_gone(pid)
    finally:
        server.end()


def spawned(pid: int) -> list[int]:
    """Children of a process that Python's multiprocessing has spawned to work for it."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


@pytest.mark.parametrize("state", ["lives", "ended", "has ended and nobody has asked"])
def test_a_process_of_vllm_that_finds_its_teacher_gone_ends(state: str) -> None:
    """It asks to end with the teacher once it has imported; the teacher may be gone by then."""
    teacher = subprocess.Popen(["sleep", "600"])
    if state != "lives":
        teacher.kill()
        os.waitid(os.P_PID, teacher.pid, os.WEXITED | os.WNOWAIT)
    if state == "ended":
        teacher.wait()
    code = "from vllm_process.children import end_with_parent\nend_with_parent()\nprint('on')"
    env = {**os.environ, "DRIFTLINE_ENGINE_PARENT": str(teacher.pid)}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    finally:
        teacher.kill()
        teacher.wait()
    assert (done.returncode, done.stdout) == ((0, "on\n") if state == "lives" else (1, ""))
