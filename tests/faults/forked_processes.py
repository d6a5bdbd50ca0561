"""Real processes in milliseconds: forked from one that has imported everything and done nothing.

gRPC must not be forked once it has objects; the process that these come from never makes one.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# The module itself is imported in every child; what it needs is there already.
_CONTEXT.set_forkserver_preload(["teacher_server.process.app", "teacher_client.client", "uvloop"])
START_S = 40.0


def _serve(folder: str, ready_file: str, settings: dict[str, Any]) -> None:
    log = os.open(Path(folder) / "servers.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from teacher_server.process.app import serve
    from teacher_server.settings import TeacherConfig

    config = TeacherConfig(ready_file=ready_file, **settings)
    raise SystemExit(asyncio.run(serve(config)))


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
        arguments = (str(self._folder), str(ready_file), self._settings)
        self._process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        self._ready_file = ready_file

    async def until_ready(self) -> ForkedTeacher:
        """Returns once it serves."""
        give_up = time.monotonic() + START_S
        while not self._ready_file.exists():
            assert self.running, (self._folder / "servers.log").read_text()[-2000:]
            assert time.monotonic() < give_up, "not ready in time"
            await asyncio.sleep(0.005)
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
            self._process.join(10)
            self._process.close()
            self._process = None

    def metrics(self) -> str:
        """What it exports, in Prometheus text format."""
        with urllib.request.urlopen(
            f"http://{self.ready['http_address']}/metrics", timeout=10
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
    process = _CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(10)
        process.close()
