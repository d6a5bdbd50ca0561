"""What a run says as it goes: metrics.jsonl, profiles.jsonl, TensorBoard, and bars in the terminal.

A line of metrics.jsonl is one step, evaluation or warning; it is flushed at once, so a killed run
loses nothing. A value that is not finite never gets there: it raises.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from torch.utils.tensorboard import SummaryWriter

from student_trainer.diagnostics import Alarm
from student_trainer.errors import ConfigError, DatasetError

METRICS_FILE = "metrics.jsonl"
PROFILES_FILE = "profiles.jsonl"
LOCK_FILE = ".lock"
WARN_EVERY_STEPS = 10
"""A warning that lasts is printed again after so many steps."""


class PhaseClock:
    """Wall seconds of one step, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Adds time that was measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Bars:
    """Progress bars in the terminal, one a name; silent when the output is not a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """Sets a bar; one that was full starts again at nought."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        task = self._tasks[name]
        if self._progress.tasks[self._progress.task_ids.index(task)].finished and done < total:
            self._progress.reset(task, total=total)
        self._progress.update(task, completed=done, total=total, note=note)


class RunLog:
    """The written record of one run.

    With `resume_from` it goes on after that step: what was written of later ones, which are done
    again, is dropped.
    """

    def __init__(self, folder: Path, bars: Bars, *, resume_from: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self.first_step: dict[str, Any] = {}
        """Metrics of the run's first step; empty before it."""
        self._warned: dict[str, int] = {}
        """Kind of a warning -> the step at which it was last printed."""
        if resume_from is not None:
            try:
                self._go_on_after(folder, resume_from)
            except BaseException:
                self._lock.close()
                raise
        mode = "w" if resume_from is None else "a"
        self._metrics = (folder / METRICS_FILE).open(mode, encoding="utf-8")
        self._profiles = (folder / PROFILES_FILE).open(mode, encoding="utf-8")
        self._board = SummaryWriter(
            folder / "tensorboard", purge_step=None if resume_from is None else resume_from + 1
        )
        self._bars = bars

    def _go_on_after(self, folder: Path, step: int) -> None:
        for name in (METRICS_FILE, PROFILES_FILE):
            _drop_later(folder / name, step)
        if (folder / METRICS_FILE).is_file():
            kept = read_lines(folder / METRICS_FILE)
            self.first_step = next((r for r in kept if r.get("kind") == "step"), {})

    def close(self) -> None:
        """Closes the files."""
        self._board.close()
        self._metrics.close()
        self._profiles.close()
        self._lock.close()

    def step(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """One step: its scalars and where its wall time went."""
        record = {**metrics, **{f"seconds_{name}": value for name, value in seconds.items()}}
        self._write("step", step, record)
        self.first_step = self.first_step or record
        self._bars.console.print(_line(step, metrics, seconds), highlight=False)

    def skipped(self, step: int, num_unscored: int, waited_s: float) -> None:
        """A step in which the teacher scored nothing, so that nothing was learnt."""
        record = {"unscored_rollouts": num_unscored, "updates": 0, "seconds_teacher_wait": waited_s}
        self._write("skipped", step, record)
        self._bars.console.print(
            f"step {step:>3}  skipped: the teacher stayed away, {num_unscored} rollouts are lost",
            style="yellow",
            highlight=False,
        )

    def evaluation(self, step: int, results: Mapping[str, float | None]) -> None:
        """One evaluation of the weights after `step` steps; absent results are left out."""
        present = {name: value for name, value in results.items() if value is not None}
        self._write("eval", step, present)
        self._bars.console.print(
            f"step {step:>3}  accuracy {results['accuracy']:.1%}", style="bold", highlight=False
        )

    def alarms(self, step: int, alarms: Sequence[Alarm]) -> None:
        """What is wrong with a step: all of it is written; printed when new and now and then."""
        for alarm in alarms:
            record = {"kind": "warning", "step": step, "warning": alarm.kind}
            self._metrics.write(json.dumps({**record, "message": alarm.message}) + "\n")
            if step - self._warned.get(alarm.kind, -WARN_EVERY_STEPS) >= WARN_EVERY_STEPS:
                self._warned[alarm.kind] = step
                self._bars.console.print(
                    f"step {step:>3}  warning: {alarm.message}",
                    style="yellow",
                    highlight=False,
                    markup=False,
                )
        self._metrics.flush()

    def profile(self, step: int, profile: Mapping[str, Any]) -> None:
        """Lengths, ends and overlap by position of one step's rollouts."""
        self._profiles.write(json.dumps({"step": step, **profile}) + "\n")
        self._profiles.flush()

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {name} of step {step} is {value}")
            self._board.add_scalar(f"{kind}/{name}", value, step)
        self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._metrics.flush()


def _line(step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> str:
    # Absent when no token of the step counted.
    reverse_kl = metrics.get("reverse_kl", 0.0)
    return (
        f"step {step:>3}  loss {metrics['loss']:.4f}  reverse KL {reverse_kl:.3f}  "
        f"length {metrics['length_mean']:.0f}  stopped {metrics['truncated_rollouts']:.0f}"
        f"/{metrics['rollouts']:.0f}  {sum(seconds.values()):.1f} s"
    )


def _locked(folder: Path) -> TextIO:
    """Holds the folder until closed or dead. Raises ConfigError when another run holds it."""
    lock = (folder / LOCK_FILE).open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"run.out {folder}: another run is writing to it") from None
    return lock


def _drop_later(path: Path, step: int) -> None:
    """Keeps the records up to a step; a killed run may have left the last line incomplete."""
    if not path.is_file():
        return
    kept = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n") or _record(f"{path}:{number}", line)["step"] > step:
            break
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file. Raises DatasetError naming the file and the line."""
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; is {path.parent} a run?")
    with path.open(encoding="utf-8") as lines:
        return [_record(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]


def _record(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON, cut short perhaps: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DatasetError(f"{where}: must be an object with `step`")
    return record
