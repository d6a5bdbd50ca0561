"""Settings of the drift policy. Defaults are the paper's; what one means is in docs/methods.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from student_trainer.settings.section import Section
from teacher_wire.records import MAX_DRIFT_K


class DriftSettings(Section):
    metric: Literal["overlap_ratio", "teacher_top_p_accept"] = "overlap_ratio"
    k: int = Field(16, gt=0, le=MAX_DRIFT_K)
    """Leading entries of student and teacher that are compared."""
    threshold: float = Field(0.7, ge=1e-9, le=1)
    """Overlap ratio below which a position is a bad event."""
    top_p: float = Field(0.95, ge=1e-9, le=1)
    """Nucleus of teacher_top_p_accept."""
    w_drop: float = Field(0.01, ge=1e-9, le=1)
    """Reliability lost a bad event."""
    stop_in_flight: bool = True
    """Stop a rollout at the first position where its reliability is 0."""
