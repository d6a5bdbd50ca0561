"""Teacher processes of a test, each started and ended by it, over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.faults.forked_processes import ForkedCommand
from tests.waiting import LIMIT_S, wait_until

ENDS_WITH_US = (
    *(sys.executable, "-S", "-E", "-c"),
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])",
)
"""Before a command: Linux kills it when the thread that started it ends, however that ends."""
CLI = ("teacher_server.cli", "serve", "--engine", "fake")
BROKEN = ("tests.faults.broken_teacher",)
"""A module with a main(), and its first arguments."""


class LiveServer:
    """One process on free ports; `output` is what it has written so far.

    Arguments come last, so they win: "--drain-s", "1" or "--grpc-port", "5000". Forked it starts in
    milliseconds, otherwise as a user starts it. A program that begins with a path is an executable.
    """

    def __init__(
        self, folder: Path, *arguments: str, program: tuple[str, ...] = CLI, forked: bool = True
    ) -> None:
        name = f"server-{time.monotonic_ns()}"
        self.ready_file = folder / f"{name}.json"
        self._log = folder / f"{name}.log"
        module, *words = [*program, "--grpc-port", "0", "--http-port", "0", "--drain-s", "5"]
        words += ["--ready-file", str(self.ready_file), *arguments]
        self._log.touch()
        self.process: ForkedCommand | subprocess.Popen[bytes]
        if Path(module).is_absolute():
            self.process = self._started([*ENDS_WITH_US, module, *words])
        elif forked:
            self.process = ForkedCommand(module, words, self._log)
        else:
            self.process = self._started([*ENDS_WITH_US, sys.executable, "-m", module, *words])
        self.ready: dict[str, Any] = {}

    def _started(self, command: list[str]) -> subprocess.Popen[bytes]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("TEACHER_")}
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_ready(self) -> LiveServer:
        wait_until(lambda: self.ready_file.exists() or self.process.poll() is not None)
        assert self.ready_file.exists(), self.output
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
            url = f"http://{self.http_address}{path}"
            with urllib.request.urlopen(url, timeout=LIMIT_S) as reply:
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

    def exit_code(self, timeout_s: float = LIMIT_S) -> int:
        """Waits for the process to end by itself."""
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Kills it and whatever it has started; nothing where it has ended by itself."""
        with suppress(ProcessLookupError):  # its session is its group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT_S)


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


def gone(pid: int) -> bool:
    """It has ended; nobody may be there to reap it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"
