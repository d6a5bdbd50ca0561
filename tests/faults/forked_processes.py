"""Real processes in milliseconds: forked from one that has imported everything and done nothing.

gRPC must not be forked once it has objects; the process that these come from never makes one.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import multiprocessing
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.waiting import LIMIT_S, eventually

_CONTEXT = multiprocessing.get_context("forkserver")
# The module itself is imported in every child; what it needs is there already.
_CONTEXT.set_forkserver_preload(
    [
        *("teacher_server.process.app", "teacher_server.cli", "teacher_client.client", "uvloop"),
        "tests.faults.broken_teacher",
    ]
)


def _run(target: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    target(*arguments)


def _end_with_the_tests() -> None:
    """Kills this process, and its session where it has one, when the tests' process is gone."""
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _serve(folder: str, ready_file: str, settings: dict[str, Any]) -> None:
    log = os.open(Path(folder) / "servers.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from teacher_server.process.app import serve
    from teacher_server.settings import TeacherConfig

    config = TeacherConfig(ready_file=ready_file, **settings)
    raise SystemExit(asyncio.run(serve(config)))


def _command(module: str, arguments: list[str], log: str) -> None:
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for name in [name for name in os.environ if name.startswith("TEACHER_")]:
        del os.environ[name]
    raise SystemExit(importlib.import_module(module).main(arguments))


class ForkedCommand:
    """A command, in a session of its own, without the time its imports take; its methods are those
    of subprocess.Popen."""

    def __init__(self, module: str, arguments: list[str], log: Path) -> None:
        """Runs main(arguments) of the module; what it writes goes to the log."""
        self._process = _CONTEXT.Process(target=_run, args=(_command, module, arguments, str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code; minus the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"still running after {timeout} s"
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedTeacher:
    """A whole teacher server as a process that can be killed and come back; fake unless told."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        """The settings are those of TeacherConfig."""
        self._folder = folder
        defaults = {"engine": "fake", "self_test": False, "grpc_port": 0, "http_port": 0}
        self._settings: dict[str, Any] = {**defaults, **settings}
        self._process: ForkServerProcess | None = None
        self.ready: dict[str, Any] = {}

    def start(self) -> None:
        """Starts it, the second time at the same port."""
        ready_file = self._folder / f"ready-{time.monotonic_ns()}.json"
        arguments = (_serve, str(self._folder), str(ready_file), self._settings)
        self._process = _CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self._ready_file = ready_file

    async def until_ready(self) -> ForkedTeacher:
        """Returns once it serves."""
        await eventually(lambda: self._ready_file.exists() or not self.running)
        assert self._ready_file.exists(), (self._folder / "servers.log").read_text()[-2000:]
        self.ready = json.loads(self._ready_file.read_text())
        self._ready_file.unlink()
        self._settings["grpc_port"] = self.port
        return self

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    @property
    def address(self) -> str:
        return str(self.ready["grpc_address"])

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        if self._process is not None:
            self._process.kill()
            self._process.join(LIMIT_S)
            self._process.close()
            self._process = None

    def metrics(self) -> str:
        """What it exports, in Prometheus text format."""
        with urllib.request.urlopen(
            f"http://{self.ready['http_address']}/metrics", timeout=LIMIT_S
        ) as reply:
            return str(reply.read().decode())

    def resident_bytes(self) -> int:
        """Memory of the process that is its own and not shared with the one it was forked from."""
        lines = Path(f"/proc/{self.ready['pid']}/status").read_text().splitlines()
        (kib,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
        return int(kib) * 1024


@contextmanager
def forked(target: Callable[..., None], *arguments: Any) -> Iterator[ForkServerProcess]:
    """A process that runs a function of an importable module; killed on leaving."""
    process = _CONTEXT.Process(target=_run, args=(target, *arguments), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(LIMIT_S)
        process.close()
