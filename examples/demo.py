"""`make demo`: a teacher server and a trainer, each in its own process, and what came of it.

Here they are started, side by side, watched, and ended: on success, failure and Ctrl-C alike. What
the trainer does is examples/demo_trainer.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
READY_FILE = "teacher.ready.json"
TRAINER_CONFIG = ROOT / "configs" / "trainer-demo.toml"
TEACHER_CONFIG = ROOT / "configs" / "teacher-demo.toml"
OUT = ROOT / "runs" / "demo"
"""The demo's own folder: each takes the place of the one before."""
START_TIMEOUT_S = 600.0
"""For a start that hangs, on a busy machine too; one that fails is noticed at once."""
STOP_TIMEOUT_S = 20.0
POLL_S = 0.2
LOG_TAIL_LINES = 20
WHAT_COMES = """\
A student learns from a teacher on this machine's CPU: about 5 minutes on two idle cores.
Both engines start (40 s); then an evaluation, 16 steps with three more, and a last one."""


def main() -> int:
    """Runs the demo; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="an earlier run there is refused")
    parser.add_argument("--set", action="append", default=[], help="trainer setting, key=value")
    arguments = parser.parse_args()
    console = Console()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    console.print(WHAT_COMES, highlight=False, soft_wrap=True)
    console.print(f"logs: {out}/teacher.log and trainer.log", highlight=False, soft_wrap=True)
    command = [sys.executable, "-m", "examples.demo_trainer"]
    command += ["--teacher-ready-file", str(out / READY_FILE)]
    command += [part for each in (f"run.out={out}", *arguments.set) for part in ("--set", each)]
    command += ["--overwrite"] * (out == OUT)

    def distil() -> None:
        with starting_teacher(out) as teacher:
            trained_beside(teacher, command, out / "trainer.log")
            console.print("ending the teacher server", highlight=False)

    if code := exit_code_of(distil, console):
        return code
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(f"trained student: {out / 'student'}", highlight=False, soft_wrap=True)
    console.print(f"whole demo: {minutes} min {seconds} s", highlight=False)
    return 0


def exit_code_of(work: Callable[[], None], console: Console) -> int:
    """0 when it is done; Ctrl-C, SIGTERM and DemoError end it with a line and another code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in a shell's background
        signal.signal(number, _interrupt)
    try:
        work()
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been ended")
        return 130
    except DemoError as error:
        console.print(f"[bold red]demo:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    finally:
        console.show_cursor()  # a trainer that was ended while it drew bars has left it hidden
    return 0


class DemoError(Exception):
    """A part of the demo failed; the message says which and where its log is."""


class Teacher:
    """A teacher server that has been started."""

    def __init__(
        self, server: subprocess.Popen[bytes], *, ready_file: Path, log_file: Path
    ) -> None:
        self._server = server
        self.ready_file = ready_file
        """Written by the server, once it serves."""
        self._log_file = log_file
        self._give_up = time.monotonic() + START_TIMEOUT_S

    def ready(self) -> bool:
        """Whether it serves. Raises DemoError when it has ended or takes too long to start."""
        ready = self.ready_file.exists()
        if self._server.poll() is not None:
            raise DemoError(f"the teacher server has ended:\n{_tail(self._log_file)}")
        if not ready and time.monotonic() > self._give_up:
            raise DemoError(f"the teacher server did not start:\n{_tail(self._log_file)}")
        return ready


@contextmanager
def starting_teacher(
    out: Path, flags: Sequence[str] = (), *, config: Path = TEACHER_CONFIG
) -> Iterator[Teacher]:
    """A teacher on free loopback ports, with further flags; the playground's. Not ready yet."""
    ready_file, log_file = out / READY_FILE, out / "teacher.log"
    ready_file.unlink(missing_ok=True)
    command = [str(BIN / "teacher-server"), "serve", "--config", str(config)]
    command += ["--ready-file", str(ready_file), "--grpc-port", "0", "--http-port", "0"]
    # Two engines on one machine: each has its own core, or every step of one waits for the other.
    command += ["--cpu-cores", str((os.cpu_count() or 1) - 1), *flags]
    with (
        log_file.open("w") as log,
        process(command, stdout=log, stderr=log) as server,
    ):
        yield Teacher(server, ready_file=ready_file, log_file=log_file)


@contextmanager
def teacher_server(out: Path, console: Console, flags: Sequence[str] = ()) -> Iterator[str]:
    """The same, waited for; yields its address."""
    with starting_teacher(out, flags) as teacher:
        yield address_once_ready(teacher, console)


def address_once_ready(teacher: Teacher, console: Console) -> str:
    """Where it is reached by gRPC, once it serves. Raises DemoError."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        progress.add_task("teacher server: loading and self-test", total=None)
        while not teacher.ready():
            time.sleep(POLL_S)
    return address_in(teacher.ready_file)


def address_in(ready_file: Path) -> str:
    """Where a server that has written its ready file is reached by gRPC."""
    address: str = json.loads(ready_file.read_text())["grpc_address"]
    return address


def trained_beside(teacher: Teacher, command: Sequence[str], log_file: Path) -> None:
    """A trainer, from its start to its end, for as long as the teacher is there."""
    # What libraries say on stderr goes to the log.
    with log_file.open("w") as log, process(command, stderr=log) as trainer:
        while trainer.poll() is None:
            teacher.ready()
            time.sleep(POLL_S)
    if trainer.returncode != 0:
        raise DemoError(
            f"the trainer failed with exit code {trainer.returncode}:\n{_tail(log_file)}"
        )


@contextmanager
def process(command: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a process group of its own, which is ended with everything it started."""
    child = subprocess.Popen(command, process_group=0, **options)  # type: ignore[call-overload]
    try:
        yield child
    finally:
        _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL for whatever of the group is left: at once when interrupted again."""
    try:
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(STOP_TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
