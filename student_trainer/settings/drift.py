"""Settings of the drift policy: one section a metric. What one means is in docs/methods.md.

Ranges are those of the records that travel to the teacher. Defaults are for language: with the
paper's 16, 0.7 and 0.01, which are the records' own, a SmolLM2-135M that lacks one layer of thirty
has 31 % bad events against the whole one, with 8 and 0.5 it has 3 % (measured, docs/LOG.md).
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

    w_drop: Share | None = None
    """Reliability lost a bad event; none: 3 / the first step's budget, so that bad events at a
    third of its tokens use it up."""
    stop_in_flight: bool = DriftPolicy().stop_in_flight
    """Stop a rollout at the first position where its reliability is 0."""


class OverlapRatioSettings(DriftSection):
    """A bad event: too few of the student's leading entries are among the teacher's."""

    metric: Literal["overlap_ratio"] = "overlap_ratio"
    """What a bad event is."""
    k: int = Field(8, gt=0, le=MAX_DRIFT_K)
    """Leading entries of student and teacher that are compared; from the ninth on those of a
    language model are mostly noise."""
    threshold: Share = 0.5
    """Overlap ratio below which a position is a bad event."""


class TeacherTopPAcceptSettings(DriftSection):
    """A bad event: the sampled token is outside the teacher's nucleus."""

    metric: Literal["teacher_top_p_accept"]
    k: int = Field(64, gt=0, le=MAX_DRIFT_K)
    """Leading entries of the teacher in which its nucleus lies; at temperature 1, 16 of a language
    model hold 0.90 of the mass and 64 hold 0.96 (measured)."""
    top_p: Share = TeacherTopPAccept().top_p
    """Mass of the teacher's nucleus; a token outside is a bad event."""


DriftSettings = Annotated[
    OverlapRatioSettings | TeacherTopPAcceptSettings,
    Field(discriminator="metric"),
    default_kind("metric", OverlapRatio.name),
]
