"""The sink of a tracker: a run's scalars go to it, and nothing that it raises reaches the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from student_trainer.diagnostics.alarms import Alarm
from student_trainer.diagnostics.groups import group_of
from student_trainer.diagnostics.step_report import EvalReport, StepReport
from student_trainer.errors import one_line


class Tracker(Protocol):
    """A place of others that draws curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step; a step that a resumed run does again comes twice."""

    def close(self) -> None:
        """Nothing more will come."""


class TrackerSink:
    """A sink of one tracker; the name of a scalar there is that of its group and its own.

    A tracker that cannot start or fails is said once, with the reason, and costs the run nothing;
    one that failed is told again, because what failed may have been the network.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._has_failed = False
        self._tracker: Tracker | None = None
        self._guarded(lambda: setattr(self, "_tracker", start()))

    def step(self, report: StepReport) -> None:
        self._log(report.step, report.values())

    def evaluation(self, report: EvalReport) -> None:
        self._log(report.step, report.values())

    def alarm(self, step: int, alarm: Alarm) -> None:
        """No scalar."""

    def close(self) -> None:
        if (tracker := self._tracker) is not None:
            self._guarded(tracker.close)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        if (tracker := self._tracker) is not None:
            named = {f"{group_of(name)}/{name}": value for name, value in values.items()}
            self._guarded(lambda: tracker.log(step, named))

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises is not the run's
            if not self._has_failed:
                self._has_failed = True
                self._say(f"trackers.report_to {self._name}: {self._why(error)}")

    def _why(self, error: Exception) -> str:
        if isinstance(error, ImportError):
            return f"{error}; pip install 'driftline[{self._name}]', the run goes on without"
        kept = "it is told no more" if self._tracker is None else "what it missed is in the folder"
        reason = one_line(error)[:300]
        return f"{type(error).__name__}: {reason}; the run goes on, {kept}"
