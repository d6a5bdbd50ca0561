"""The written record of one run: one report in, any number of sinks.

It holds the run's folder, so that two runs cannot write to one; knows what the run said first, so
that alarms can compare; and lets no value through that is not finite. Knows no file and no metric.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TextIO

from rollout_records.schema import FOLDER
from rollout_records.writing import drop_later as drop_later_rollouts
from student_trainer.diagnostics.alarms import Alarm, Method, warnings_of
from student_trainer.diagnostics.step_report import EvalReport, StepReport
from student_trainer.errors import ConfigError
from student_trainer.recording.json_lines import JsonLines, drop_later, read_run
from student_trainer.recording.run_folder import clear, refuse_occupied
from student_trainer.recording.terminal import Bars, Terminal
from student_trainer.recording.texts import Texts

LOCK_FILE = ".lock"


class Sink(Protocol):
    """A place that reports go to."""

    def step(self, report: StepReport) -> None:
        """One step, learnt from or skipped."""

    def evaluation(self, report: EvalReport) -> None:
        """One evaluation."""

    def alarm(self, step: int, alarm: Alarm) -> None:
        """What is wrong with a step."""

    def close(self) -> None:
        """Nothing more will come."""


class Recorder:
    """Reports of one run to a folder and the terminal, and to the sinks that are added.

    With `resume_from` it goes on after that step: what was written of later ones, which are done
    again, is dropped.
    """

    def __init__(
        self,
        folder: Path,
        bars: Bars,
        *,
        resume_from: int | None = None,
        overwrite: bool = False,
        decode: Callable[[int], str] = str,
        method: Method | None = None,
    ) -> None:
        """Raises ConfigError when another run writes to the folder, or one that begins would
        `overwrite` an earlier one; DatasetError when what a resumed run wrote cannot be read.
        `decode` gives the text of a token id, `method` what the alarms advise by."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self._decode, self._method = decode, method
        self.progress = bars.update
        self.first_step: StepReport | None = None
        """The first step that learnt; None before it."""
        self.last_evaluation: int | None = None
        """Steps before the last evaluation; None when there was none."""
        try:
            if resume_from is not None:
                self._go_on_after(folder, resume_from)
            else:
                refuse_occupied(folder, overwrite=overwrite)
                clear(folder)
        except BaseException:
            self._lock.close()
            raise
        self._sinks: list[Sink] = [
            JsonLines(folder, append=resume_from is not None),
            Texts(folder, append=resume_from is not None),
            Terminal(bars),
        ]

    def _go_on_after(self, folder: Path, step: int) -> None:
        drop_later(folder, step)
        drop_later_rollouts(folder / FOLDER, step)
        kept = read_run(folder)
        self.first_step = next(iter(kept.steps), None)
        self.last_evaluation = kept.evaluations[-1].step if kept.evaluations else None

    def add(self, sink: Sink) -> None:
        """One more that is told from here on, and closed with the rest."""
        self._sinks.append(sink)

    def step(self, report: StepReport) -> None:
        """Writes a step down, and what is wrong with it."""
        _check_finite(report.step, report.values())
        for sink in self._sinks:
            sink.step(report)
        if self.first_step is None and report.learning is not None:
            self.first_step = report
        alarms = warnings_of(
            report, first=self.first_step, decode=self._decode, method=self._method
        )
        for alarm in alarms:
            for sink in self._sinks:
                sink.alarm(report.step, alarm)

    def evaluation(self, report: EvalReport) -> None:
        """Writes an evaluation down."""
        _check_finite(report.step, report.values())
        for sink in self._sinks:
            sink.evaluation(report)
        self.last_evaluation = report.step

    def close(self) -> None:
        """Closes every sink and lets go of the folder."""
        for sink in self._sinks:
            sink.close()
        self._lock.close()


def _check_finite(step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"metric {name} of step {step} is {value}")


def _locked(folder: Path) -> TextIO:
    """Holds the folder until closed or dead. Raises ConfigError when another run holds it."""
    lock = (folder / LOCK_FILE).open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"run.out {folder}: another run is writing to it") from None
    return lock
