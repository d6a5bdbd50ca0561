"""What a person in front of the terminal sees of a run: a line a step, warnings, and bars."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from student_trainer.diagnostics.alarms import Alarm
from student_trainer.diagnostics.step_report import EvalReport, StepReport

WARN_EVERY_STEPS = 10
"""A warning that lasts is printed again after so many steps."""
LINE_EVERY_S = 10.0
"""Where there is no terminal, a line says so often that something goes on."""


class Bars:
    """Progress bars in the terminal, one a name; now and then a line where there is none."""

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
        self._said_at = time.monotonic()
        self._noted = ""

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """What begins now and may last, where there is no terminal to see it on."""
        if self._progress.disable:
            self.console.print(text, highlight=False, markup=False)

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """Sets a bar; one that was full starts again at nought."""
        if self._progress.disable:
            self._say(name, done, total, note)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        task = self._tasks[name]
        if self._progress.tasks[self._progress.task_ids.index(task)].finished and done < total:
            self._progress.reset(task, total=total)
        self._progress.update(task, completed=done, total=total, note=note)

    def _say(self, name: str, done: int, total: int, note: str) -> None:
        """Now and then; at once where the note is another one."""
        now = time.monotonic()
        begins = bool(note) and note != self._noted
        if begins or (done < total and now - self._said_at >= LINE_EVERY_S):
            self._said_at, self._noted = now, note
            self.console.print(f"{name} {done}/{total} {note}".rstrip(), highlight=False)


class Terminal:
    """A sink above the bars."""

    def __init__(self, bars: Bars) -> None:
        self._console = bars.console
        self._warned: dict[str, int] = {}
        """Kind of a warning -> the step at which it was last printed."""

    def step(self, report: StepReport) -> None:
        learning, rollouts = report.learning, report.generation
        if learning is None or rollouts is None:
            self._print(
                f"step {report.step:>3}  skipped: the teacher stayed away, "
                f"{report.unscored_rollouts} rollouts are lost",
                style="yellow",
            )
            return
        # Absent when no token of the step counted.
        reverse_kl = "none" if learning.reverse_kl is None else f"{learning.reverse_kl:.3f}"
        self._print(
            f"step {report.step:>3}  loss {learning.loss:.4f}  reverse KL {reverse_kl}  "
            f"length {rollouts.length_mean:.0f}  stopped {rollouts.truncated_rollouts}"
            f"/{rollouts.rollouts}  {report.seconds.total:.1f} s"
        )

    def evaluation(self, report: EvalReport) -> None:
        self._print(f"step {report.step:>3}  {'  '.join(_figures(report))}", style="bold")

    def alarm(self, step: int, alarm: Alarm) -> None:
        """Printed when new, and now and then while it lasts."""
        if step - self._warned.get(alarm.kind, -WARN_EVERY_STEPS) >= WARN_EVERY_STEPS:
            self._warned[alarm.kind] = step
            self._print(f"step {step:>3}  warning: {alarm.message}", style="yellow")

    def close(self) -> None:
        """The bars belong to whoever made them."""

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, highlight=False, markup=False)


def _figures(report: EvalReport) -> Iterator[str]:
    if report.accuracy is not None:
        yield f"accuracy {report.accuracy:.1%}"
    if report.ungraded:
        yield f"not graded {report.ungraded}"
    if (heldout := report.heldout) is None:
        return
    if heldout.reverse_kl is not None and heldout.teacher_logprob is not None:
        yield (
            f"held out: reverse KL {heldout.reverse_kl:.3f}  "
            f"teacher log-prob {heldout.teacher_logprob:.3f}"
        )
    if heldout.unscored:
        yield f"not scored {heldout.unscored}"
