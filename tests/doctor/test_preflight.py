"""What the doctors look at, on real files, ports, certificates and clocks.

Run: pytest tests/doctor/test_preflight.py
"""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from preflight import certificates, clock, software
from preflight.disk import why_not_writable
from preflight.findings import made, ok, problem, skipped, warning
from preflight.gpus import Driver, Gpu, driver
from preflight.ports import listener
from preflight.showing import as_json, shown
from preflight.software import compiler, versions, why_no_vllm
from teacher_wire.secret_files import why_refused
from tests.faults.made_certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
SMI = """#!/bin/sh
echo "0, GPU-aa11, NVIDIA H100, 81559, 100, 580.65.06"
echo "1, GPU-bb22, NVIDIA H100, 81559, 70000, 580.65.06"
"""
SILENT = Driver(version=None, why_not="there is no nvidia-smi on PATH")


@pytest.fixture
def with_smi(tmp_path: Path) -> dict[str, str]:
    """An environment in which `nvidia-smi` answers for two GPUs: there are none here."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    return {"PATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("chosen", "indices"),
    [(None, [0, 1]), ("1,0", [1, 0]), ("GPU-bb", [1]), ("", []), ("1,7,0", [1])],
)
def test_gpus_are_those_that_the_environment_leaves(
    with_smi: dict[str, str], chosen: str | None, indices: list[int]
) -> None:
    env = with_smi if chosen is None else {**with_smi, "CUDA_VISIBLE_DEVICES": chosen}
    found = driver(env)
    assert found.version == "580.65.06"
    assert [gpu.index for gpu in found.gpus] == indices
    assert found.is_there == bool(indices)
    assert all(gpu.total_bytes == 81559 << 20 for gpu in found.gpus)
    if not indices:
        assert found.why_none == "CUDA_VISIBLE_DEVICES is ''"


def test_a_driver_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    assert driver({"PATH": str(tmp_path)}).why_none == "there is no nvidia-smi on PATH"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    found = driver({"PATH": str(tmp_path)})
    assert found.version is None
    assert found.why_none == "nvidia-smi failed: Driver/library version mismatch"


def test_vllm_for_cuda_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "find_spec", lambda name: object())
    monkeypatch.setattr(software, "installed", {"vllm": "0.32.0"}.get)
    monkeypatch.setattr("preflight.gpus.has_devices", lambda: False)
    assert "no NVIDIA GPU is seen here (there is no nvidia-smi" in (why_no_vllm(SILENT) or "")
    gpu = Gpu(index=0, name="H100", total_bytes=1, used_bytes=0)
    assert why_no_vllm(Driver(version="1", gpus=(gpu,))) is None
    # A container may lack nvidia-smi and have the GPU.
    monkeypatch.setattr("preflight.gpus.has_devices", lambda: True)
    assert why_no_vllm(SILENT) is None
    monkeypatch.setattr("preflight.gpus.has_devices", lambda: False)
    monkeypatch.setattr(software, "installed", {"vllm": "0.32.0+rocm700"}.get)
    assert why_no_vllm(SILENT) is None
    monkeypatch.setattr(software, "find_spec", lambda name: None)
    assert "vLLM is not installed" in (why_no_vllm(SILENT) or "")


def test_a_compiler_without_headers_is_a_problem_where_something_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = compiler(needed=True, what_else="set enforce_eager")
    assert found.level == "ok"
    monkeypatch.setattr(
        "preflight.software.sysconfig.get_path", {"include": str(tmp_path)}.__getitem__
    )
    (found,) = compiler(needed=True, what_else="set enforce_eager")
    assert (found.level, f"no {tmp_path}/Python.h" in found.seen) == ("problem", True)
    assert found.remedy.endswith("(Debian: g++ and python3-dev), or set enforce_eager")
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = compiler(needed=False, what_else="")
    assert found.level == "ok"
    assert found.seen.startswith("no C++ compiler (g++, c++, clang++), no ")


def test_a_version_that_driftline_was_not_made_for_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(software, "installed", {"torch": "2.1.0", "grpcio": "1.85.3"}.get)
    monkeypatch.setattr(
        software, "requires", {"driftline": ["torch==2.13.0"], "driftline-client": []}.__getitem__
    )
    found = [*versions(["torch", "grpcio"], ["torch", "transformers"])]
    assert [(one.level, one.seen) for one in found[1:]] == [
        ("problem", "transformers is not installed"),
        ("warning", "torch is 2.1.0"),
    ]
    assert found[2].limit == "driftline is made for ==2.13.0"


@pytest.mark.parametrize(
    ("lasts", "level"),
    [
        (timedelta(days=90), "ok"),
        (timedelta(days=3), "warning"),
        (timedelta(minutes=-1), "problem"),
    ],
)
def test_a_certificate_is_read_whether_or_not_it_has_ended(
    tmp_path: Path, lasts: timedelta, level: str
) -> None:
    pair = Authority(tmp_path, "ours").issue(
        "teacher", hosts=("127.0.0.1", "t.example"), lasts=lasts
    )
    read = certificates.read(pair.cert, pair.key)
    assert set(read.names) == {"127.0.0.1", "t.example"}
    assert abs(read.not_after - (time.time() + lasts.total_seconds())) < 300
    (found,) = certificates.lasting("tls", read, "it", "a new one")
    assert found.level == level


def test_a_key_of_another_certificate_is_no_pair(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    with pytest.raises(OSError, match=r"(?i)key values mismatch"):
        certificates.read(ours.issue("a").cert, ours.issue("b").key)


def test_a_port_that_is_taken_cannot_be_listened_on() -> None:
    with listener("127.0.0.1", 0) as held:
        with pytest.raises(OSError, match="in use") as caught:
            listener("127.0.0.1", held.getsockname()[1])
        assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="Cannot assign"):
        listener("192.0.2.1", 0)
    for host in ("nohost.invalid", "a..b"):
        with pytest.raises(socket.gaierror):
            listener(host, 0)
    with listener("::1", 0) as held:
        assert held.family == socket.AF_INET6


def test_a_folder_that_cannot_be_written_is_told_with_who_may_not(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path / "run" / "of" / "today") is None
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").touch()
    assert "is a file: choose another" in (why_not_writable(tmp_path / "file" / "run") or "")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    code = "import sys; from preflight.disk import *; print(why_not_writable(Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(closed / "run")]
    if os.geteuid() == 0:  # which may write anywhere, until it gives that up
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert f"{closed} cannot be written to by user {os.geteuid()}: " in done.stdout, done.stderr
    assert f"(chown {os.geteuid()} {closed})" in done.stdout


def test_a_secret_that_every_user_can_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o640)
    assert why_refused(token, "the token") is None
    token.chmod(0o644)
    assert why_refused(token, "the token") == (
        f"{token} holds the token and has mode 0644: every user of this machine can read it; "
        f"chmod o-r {token}"
    )


class _Dated(BaseHTTPRequestHandler):
    ahead_s = 0.0

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + self.ahead_s, usegmt=True)

    def do_GET(self) -> None:
        self.send_response(503)  # a teacher that loads has a clock too
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def dated(ahead_s: float) -> Iterator[str]:
    """A server whose clock is wrong."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_", (_Dated,), {"ahead_s": ahead_s}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/healthz"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("ahead_s", "level", "word"), [(0, "ok", ""), (-3600, "warning", "ahead")])
def test_a_clock_is_held_against_another(ahead_s: float, level: str, word: str) -> None:
    with dated(ahead_s) as url:
        (found,) = clock.against(url)
    assert found.level == level
    assert word in found.seen
    assert found.limit == "at most 5 s"


def test_a_clock_that_nobody_tells_is_skipped_and_ones_own_is_told() -> None:
    (found,) = clock.against("http://127.0.0.1:1/")
    assert found.level == "skipped"
    (found,) = clock.own()
    assert "UTC" in found.seen


@pytest.mark.parametrize("url", ["http://[::1", "teacher:8080", "http://teacher:port/"])
def test_what_is_no_url_is_said_to_be_none(url: str) -> None:
    (found,) = clock.against(url)
    assert found.level == "warning"
    assert found.seen.startswith(f"{url!r} is no URL: ")


def test_a_server_that_is_not_http_has_no_clock() -> None:
    with listener("127.0.0.1", 0) as held:

        def answer() -> None:
            connection, _ = held.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\0\0\0\4\0\0\0\0\0\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        (found,) = clock.against(f"http://127.0.0.1:{held.getsockname()[1]}/")
        thread.join()
    assert found.level == "skipped"
    assert "does not answer: " in found.seen


def test_a_check_that_breaks_is_told_and_the_others_go_on() -> None:
    def refuses() -> Iterator[object]:
        raise ValueError("port is 0,\nmust be more")

    found = [
        *made(
            [
                ("breaks", lambda: [ok("breaks", str(1 / 0))]),
                ("refuses", refuses),  # type: ignore[list-item]
                ("holds", lambda: [ok("holds", "yes")]),
            ],
            (ValueError,),
        )
    ]
    assert [(one.check, one.level) for one in found] == [
        ("breaks", "problem"),
        ("refuses", "problem"),
        ("holds", "ok"),
    ]
    assert found[0].seen == "this check failed: ZeroDivisionError: division by zero"
    assert found[1].seen == "port is 0, must be more"


def test_findings_are_lines_for_a_person_and_an_object_for_a_program() -> None:
    found = [
        ok("ports", "free"),
        skipped("clock", "unknown"),
        warning("disk", "1 GB free", "2 GB wanted", "make room"),
        problem("tls", "ended", remedy="a new one, of the same names, from the same authority"),
        problem("gpu", "none"),
    ]
    out = io.StringIO()
    shown(found, Console(file=out, width=40))
    assert out.getvalue().splitlines() == [
        "ok       ports       free",
        "skipped  clock       unknown",
        "warning  disk        1 GB free (2 GB wanted)",
        "                     -> make room",
        "problem  tls         ended",
        "                     -> a new one, of the same names, from the same authority",
        "problem  gpu         none",
        "2 problems, 1 warning, 1 ok, 1 skipped",
    ]
    told = json.loads(as_json(found, "teacher-server", "0.2.0"))
    assert (told["problem"], told["version"]) == (True, "0.2.0")
    assert told["findings"][2] == {
        "check": "disk",
        "level": "warning",
        "seen": "1 GB free",
        "limit": "2 GB wanted",
        "remedy": "make room",
    }


def test_a_terminal_has_colours_and_long_lines_are_broken_beside_the_check() -> None:
    out = io.StringIO()
    console = Console(file=out, width=48, force_terminal=True, color_system="standard")
    shown([problem("memory", "weights and cache are more than the GPU has")], console)
    assert "\x1b[1;31mproblem" in out.getvalue()
    plain = [line for line in out.getvalue().splitlines() if "than" in line]
    assert plain
    assert plain[0].startswith(" " * 21)
