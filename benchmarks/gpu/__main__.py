"""What a GPU must show, in one command, and on a CPU at a small size.

    python -m benchmarks.gpu --minutes 9 --json PATH
    python -m benchmarks.gpu --parts parity sharded

Each part is a process of its own, bounded by the time that is left. The file is written after every
row; the same command goes on: what is done of the same commit on the same card is not run again,
what failed or was cut off is, behind what was never begun. docs/gpu.md
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import CARD
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.results import CUT, DONE, FAILED, SKIPPED, Results, code_of_this
from benchmarks.provenance import ROOT
from benchmarks.trainers.memory import tree

LOGS = ROOT / "runs" / "bench-logs"
LEAST_S = 20.0
"""What a part needs to begin with."""
CARD_LIMIT_S = 180.0
Say = Callable[[str], None]
Event = dict[str, Any]


class PartError(Exception):
    """A child that ended otherwise than it should; the message is its last line."""


class OutOfTimeError(PartError):
    """A child that was ended."""


def main(words: Sequence[str] | None = None, say: Say = print) -> int:
    """Returns 1 where a part failed, else 0."""
    arguments = parser().parse_args(words)
    ends = time.monotonic() + 60 * arguments.minutes
    flags = [f"--device={arguments.device}", f"--size={arguments.size}"]
    card: Event = {}
    try:
        for event in child(CARD, flags, CARD_LIMIT_S):
            if event["event"] == CARD:
                card = content_of(event)
    except PartError as error:
        say(f"no device to measure on: {error}")
        return 1
    results = Results(arguments.json, code_of_this(arguments.commit), card)
    flags = [f"--device={card['device']}", f"--size={card['size']}"]
    flags += [f"--rate={card['product_tflops']}", f"--card={card['card']}"]
    for name in results.to_run(arguments.parts):
        run(name, flags, results, ends, say)
    results.write()
    say(results.document())
    return 1 if any(results.state(name) == FAILED for name in arguments.parts) else 0


def run(name: str, flags: Sequence[str], results: Results, ends: float, say: Say) -> None:
    """One part, into the results."""
    part, left = PARTS[name], ends - time.monotonic()
    if missing := part.missing():
        results.keep(name, state=SKIPPED, error=f"needs {', '.join(missing)}", rows=[])
        say(f"{name}: skipped, needs {', '.join(missing)}")
        return
    if left < LEAST_S:
        if results.state(name) not in (CUT, FAILED):
            results.keep(name, state=SKIPPED, error="no time was left", rows=[])
        say(f"{name}: no time is left")
        return
    started, rows = time.monotonic(), list[Event]()

    def kept(state: str, error: str | None = None) -> None:
        seconds = round(time.monotonic() - started, 1)
        results.keep(name, state=state, error=error, seconds=seconds, rows=rows)

    try:
        for event in child(name, flags, left):
            if event["event"] != "row":
                continue
            rows.append(row := content_of(event))
            kept(CUT)
            figures = " ".join(f"{key} {value:.4g}" for key, value in row["figures"].items())
            say(f"{name}: {row['name']}: {row['error'] or figures}")
    except OutOfTimeError as error:
        kept(CUT, str(error))
    except PartError as error:
        kept(FAILED, str(error))
    else:
        kept(FAILED if any(row["fails"] for row in rows) else DONE)
    say(f"{name}: {results.state(name)} after {time.monotonic() - started:.0f} s")


def content_of(event: Event) -> Event:
    """What a line says but for its kind and its time."""
    return {name: value for name, value in event.items() if name not in ("event", "at")}


def child(part: str, flags: Sequence[str], limit_s: float) -> Iterator[Event]:
    """What a child tells, as it comes. Raises PartError, OutOfTimeError."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"gpu-{part}.log"
    paths = [str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "benchmarks.gpu.child", part, *flags]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stream,
            process_group=0,
        )
        with ended_within(process, limit_s) as was_late:
            assert process.stdout is not None
            last = ""
            for line in process.stdout:
                event: Event = json.loads(line)
                last = event["event"]
                yield event
            code = process.wait()
    if was_late.is_set():
        raise OutOfTimeError(f"ended after {limit_s:.0f} s")
    if code or last != "done":
        raise PartError(f"{last_line(log)} (exit code {code})")


@contextmanager
def ended_within(process: subprocess.Popen[bytes], limit_s: float) -> Iterator[threading.Event]:
    """Kills a process and all that it started, late or at the end; says whether it was late."""
    was_late = threading.Event()

    def end() -> None:
        # What it started may be in groups of their own.
        for pid in tree(process.pid) if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def late() -> None:
        was_late.set()
        end()

    timer = threading.Timer(limit_s, late)
    timer.start()
    try:
        yield was_late
    finally:
        timer.cancel()
        end()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "bench-gpu.json"
    made.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    made.add_argument("--json", type=Path, default=default, metavar="PATH", help="results")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument(
        "--size", choices=("full", "small", "tiny"), default="", help="full on a GPU, else small"
    )
    made.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="only these")
    made.add_argument("--commit", help="of a copy without git")
    return made


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
