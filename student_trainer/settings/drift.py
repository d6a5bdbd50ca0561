"""Settings of the drift policy: one section a metric. What one means is in docs/methods.md.

Defaults and ranges are those of the records that travel to the teacher, which are the paper's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from student_trainer.settings.section import Section, default_kind
from teacher_wire.drift_metrics import MAX_DRIFT_K, MIN_SHARE, OverlapRatio, TeacherTopPAccept
from teacher_wire.records import DriftPolicy

Share = Annotated[float, Field(ge=MIN_SHARE, le=1)]


class DriftSection(Section):
    """What every metric has."""

    k: int = Field(OverlapRatio().k, gt=0, le=MAX_DRIFT_K)
    """Leading entries of student and teacher that are compared."""
    w_drop: Share = DriftPolicy().w_drop
    """Reliability lost a bad event."""
    stop_in_flight: bool = DriftPolicy().stop_in_flight
    """Stop a rollout at the first position where its reliability is 0."""


class OverlapRatioSettings(DriftSection):
    """A bad event: too few of the student's leading entries are among the teacher's."""

    metric: Literal["overlap_ratio"] = "overlap_ratio"
    """What a bad event is."""
    threshold: Share = OverlapRatio().threshold
    """Overlap ratio below which a position is a bad event."""


class TeacherTopPAcceptSettings(DriftSection):
    """A bad event: the sampled token is outside the teacher's nucleus."""

    metric: Literal["teacher_top_p_accept"]
    top_p: Share = TeacherTopPAccept().top_p
    """Mass of the teacher's nucleus; a token outside is a bad event."""


DriftSettings = Annotated[
    OverlapRatioSettings | TeacherTopPAcceptSettings,
    Field(discriminator="metric"),
    default_kind("metric", OverlapRatio.name),
]
