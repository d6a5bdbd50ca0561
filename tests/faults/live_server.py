"""Teacher processes of a test, each started and ended by it, over loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 60.0
CLI = (sys.executable, "-m", "teacher_server.cli", "serve", "--engine", "fake")
BROKEN = (sys.executable, str(Path(__file__).with_name("broken_teacher.py")))


class LiveServer:
    """One process on free ports; `output` is what it has written so far.

    Arguments come last, so they win: "--drain-s", "1" or "--grpc-port", "5000".
    """

    def __init__(self, folder: Path, *arguments: str, program: tuple[str, ...] = CLI) -> None:
        name = f"server-{time.monotonic_ns()}"
        self.ready_file = folder / f"{name}.json"
        self._log = folder / f"{name}.log"
        command = [*program, "--grpc-port", "0", "--http-port", "0", "--drain-s", "5"]
        command += ["--ready-file", str(self.ready_file), *arguments]
        env = {key: value for key, value in os.environ.items() if not key.startswith("TEACHER_")}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        self.ready: dict[str, Any] = {}

    def wait_until_ready(self) -> LiveServer:
        give_up = time.monotonic() + START_S
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < give_up, f"not ready in time: {self.output}"
            time.sleep(0.02)
        self.ready = json.loads(self.ready_file.read_text())
        return self

    @property
    def output(self) -> str:
        return self._log.read_text("utf-8", "backslashreplace")

    @property
    def address(self) -> str:
        return str(self.ready["grpc_address"])

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    @property
    def http_address(self) -> str:
        return str(self.ready["http_address"])

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an HTTP GET."""
        try:
            with urllib.request.urlopen(f"http://{self.http_address}{path}", timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def rss_bytes(self) -> int:
        """Memory that the process holds now."""
        status = self._proc("status")
        return int(status.split("VmRSS:")[1].split()[0]) << 10

    def cpu_s(self) -> float:
        """CPU time that the process has used, user and system."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def num_fds(self) -> int:
        """File descriptors that the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self, timeout_s: float = START_S) -> int:
        """Waits for the process to end by itself."""
        return self.process.wait(timeout_s)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@contextmanager
def live_server(
    folder: Path, *arguments: str, program: tuple[str, ...] = CLI
) -> Iterator[LiveServer]:
    """A server that is ready; it is ended on leaving."""
    server = LiveServer(folder, *arguments, program=program)
    try:
        yield server.wait_until_ready()
    finally:
        server.end()
