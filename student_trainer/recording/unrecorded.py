"""What a process of several records that is not the one that writes: nothing."""

from __future__ import annotations

from collections.abc import Mapping

from student_trainer.diagnostics.step_report import EvalReport, StepReport


class Unrecorded:
    """In place of recorder and record."""

    last_evaluation: int | None = None

    def progress(self, name: str, done: int, total: int, note: str = "") -> None:
        """No bar."""

    def step(self, report: StepReport) -> None:
        """The first process has the same."""

    def evaluation(self, report: EvalReport) -> None:
        """The first process has it."""

    def keep_probe(self, gaps_nats: Mapping[str, float | None]) -> None:
        """The first process keeps its own."""

    def finish(self) -> None:
        """The first process says so."""
