"""The scalars of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from student_trainer.diagnostics.alarms import Alarm
from student_trainer.diagnostics.step_report import EvalReport, StepReport


class TensorBoard:
    """A sink of event files; the tag of a scalar is the kind of its line and its name."""

    def __init__(self, folder: Path, *, resume_from: int | None) -> None:
        self._board = SummaryWriter(
            folder / "tensorboard", purge_step=None if resume_from is None else resume_from + 1
        )

    def step(self, report: StepReport) -> None:
        self._add(report.kind, report.step, report.values())

    def evaluation(self, report: EvalReport) -> None:
        self._add("eval", report.step, report.values())

    def alarm(self, step: int, alarm: Alarm) -> None:
        """No scalar."""

    def close(self) -> None:
        self._board.close()

    def _add(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
