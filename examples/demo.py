"""`make demo`: a teacher server in its own process, a trainer against it, and what came of it.

Every process started here is ended here, on success, failure and Ctrl-C alike.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PLAYGROUND = ROOT / "examples" / "playground" / "checkpoints"
TRAINER_CONFIG = ROOT / "configs" / "trainer-demo.toml"
TEACHER_CONFIG = ROOT / "configs" / "teacher-demo.toml"
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 20


def main() -> int:
    """Runs the demo; returns the exit code of the first part that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--set", action="append", default=[], help="trainer setting, key=value")
    arguments = parser.parse_args()
    console = Console()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in a shell's background
        signal.signal(number, _interrupt)
    trainer = [str(BIN / "student-trainer")]
    config = ["--config", str(TRAINER_CONFIG), "--set", f"run.out={out}"]
    config += [part for override in arguments.set for part in ("--set", override)]
    try:
        with teacher_server(out, console) as address:
            endpoint = ["--set", f'teacher.endpoints=["{address}"]']
            run([*trainer, "train", *config, *endpoint], out / "trainer.log", "the trainer")
        teacher_eval = out / "teacher_eval.json"
        evaluate = [*trainer, "eval", *config, "--model", str(PLAYGROUND / "teacher")]
        evaluate += ["--json", str(teacher_eval)]
        run(evaluate, out / "teacher_eval.log", "the teacher's evaluation")
        report = [*trainer, "report", str(out), "--teacher-eval", str(teacher_eval)]
        run(report, out / "report.log", "the report")
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been ended")
        return 130
    except DemoError as error:
        console.print(f"[bold red]demo:[/] {error}", highlight=False)
        return 1
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(f"trained student: {out / 'student'}", highlight=False)
    console.print(f"whole demo: {minutes} min {seconds} s", highlight=False)
    return 0


class DemoError(Exception):
    """A part of the demo failed; the message says which and where its log is."""


@contextmanager
def teacher_server(out: Path, console: Console, flags: Sequence[str] = ()) -> Iterator[str]:
    """The playground's teacher on free loopback ports, with further flags; yields its address."""
    ready_file, log_file = out / "teacher.ready.json", out / "teacher.log"
    ready_file.unlink(missing_ok=True)
    command = [str(BIN / "teacher-server"), "serve", "--config", str(TEACHER_CONFIG)]
    command += ["--ready-file", str(ready_file), "--grpc-port", "0", "--http-port", "0"]
    # Two engines on one machine: each has its own core, or every step of one waits for the other.
    command += ["--cpu-cores", str((os.cpu_count() or 1) - 1), *flags]
    with (
        log_file.open("w") as log,
        process(command, stdout=log, stderr=log) as server,
    ):
        _wait_until_ready(server, ready_file, log_file, console)
        yield json.loads(ready_file.read_text())["grpc_address"]


def _wait_until_ready(
    server: subprocess.Popen[bytes], ready_file: Path, log_file: Path, console: Console
) -> None:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        progress.add_task("teacher server: loading and self-test", total=None)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready_file.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the teacher server did not start:\n{_tail(log_file)}")
            time.sleep(0.2)


@contextmanager
def process(command: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a process group of its own, which is ended with everything it started."""
    child = subprocess.Popen(command, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield child
    finally:
        _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL for whatever of the group is left."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run(command: Sequence[str], log_file: Path, what: str) -> None:
    """Runs one part to its end; what libraries say on stderr goes to its log."""
    with log_file.open("w") as log, process(command, stderr=log) as child:
        if child.wait() != 0:
            raise DemoError(f"{what} failed with exit code {child.returncode}:\n{_tail(log_file)}")


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
