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

from tests.rounds import in_the_long_round
from tests.teacher.engine.engine_models import write_tiny_model
from tests.tracked_files import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

UNTIL_S = 500.0
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


class Started:
    """A teacher as a user starts it, with its output; it is killed on leaving."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.ready_file, self._log = folder / "ready.json", folder / "log"
        command = [sys.executable, "-m", "teacher_server.cli", "serve", "--engine", "fake"]
        command += ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(self.ready_file)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([*command, *flags], stdout=log, stderr=log)

    @property
    def output(self) -> str:
        return self._log.read_text("utf-8", "backslashreplace")

    def until(self, true: Callable[[], object]) -> None:
        give_up = time.monotonic() + UNTIL_S
        while not true():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < give_up, self.output
            time.sleep(0.01)

    def exit_code(self) -> int:
        return self.process.wait(UNTIL_S)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "module",
    ["argparse", "pydantic_settings", "grpc", "fastapi", "teacher_server.process.app", "uvloop"],
)
def test_a_signal_while_it_imports(
    module: str, number: int, stop_at: Callable[[str], Path], tmp_path: Path
) -> None:
    reached = stop_at(module)
    with Started(tmp_path) as server:
        server.until(reached.exists)
        server.process.send_signal(number)
        assert server.exit_code() == 0
        lines = [line for line in server.output.splitlines() if " INFO " not in line]
        assert lines == [f"teacher-server: signal {int(number)} before it served: ended"]


@pytest.mark.parametrize("module", ["argparse", "pydantic_settings"])
def test_ctrl_c_while_another_command_imports_leaves_no_traceback(
    module: str, stop_at: Callable[[str], Path]
) -> None:
    reached = stop_at(module)
    command = [sys.executable, "-m", "teacher_server.cli", "show-config", "--engine", "fake"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            give_up = time.monotonic() + UNTIL_S
            while not reached.exists():
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(UNTIL_S) == -signal.SIGINT
            assert process.stdout is not None
            assert process.stdout.read() == b""
        finally:
            process.kill()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_signal_while_the_checkpoint_is_read(
    loop: str, stop_at: Callable[[str], Path], tmp_path: Path
) -> None:
    reached = stop_at("teacher_server.engine.hf_engine")
    model = str(ROOT / "examples/playground/checkpoints/teacher")
    with Started(tmp_path, "--engine", "hf", "--model", model, "--event-loop", loop) as server:
        server.until(reached.exists)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_signal_while_the_engine_is_tested(loop: str, tmp_path: Path) -> None:
    with Started(tmp_path, "--fake-latency-s", "3600", "--event-loop", loop) as server:
        server.until(lambda: "testing the engine" in server.output)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert not server.ready_file.exists()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_signal_after_the_drain_changes_nothing(
    loop: str, stop_at: Callable[[str], Path], tmp_path: Path
) -> None:
    reached = stop_at("exit")
    with Started(tmp_path, "--event-loop", loop) as server:
        server.until(server.ready_file.exists)
        server.process.send_signal(signal.SIGTERM)
        server.until(reached.exists)
        for number in (signal.SIGTERM, signal.SIGINT):
            server.process.send_signal(number)
        (tmp_path / "go").touch()
        assert server.exit_code() == 0


@in_the_long_round  # to one that serves: test_demo.py
@pytest.mark.vllm
@pytest.mark.parametrize("moment", ["its engine is there", "testing the engine"])
def test_a_signal_while_vllm_starts_takes_its_engine_along(moment: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    flags = ["--engine", "vllm", "--model", str(model), "--max-context", "192", "--max-k", "16"]
    flags += ["--kv-cache-gib", "0.05", "--enforce-eager", "--cpu-cores", "0"]
    engine: list[int] = []

    def begun() -> bool:
        engine[:] = spawned(server.process.pid)
        return bool(engine) and (moment == "its engine is there" or moment in server.output)

    with Started(tmp_path, *flags) as server:
        server.until(begun)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
    give_up = time.monotonic() + UNTIL_S
    while any(map(lives, engine)):
        assert time.monotonic() < give_up, engine
        time.sleep(0.01)


def spawned(pid: int) -> list[int]:
    """Children of a process that Python's multiprocessing has spawned to work for it; vLLM's name
    themselves after a while."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in _read(task / "children").split()]
    named = {child: _read(Path(f"/proc/{child}/cmdline")) for child in children}
    return [child for child in children if "spawn_main" in named[child] or "VLLM" in named[child]]


def lives(pid: int) -> bool:
    """Nobody may be there to ask how it ended."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] not in ([], ["Z"])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


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
