"""Which replicas of a run's teachers are up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReading:
    """One endpoint of a teacher at one moment."""

    teacher: str
    """The table of the settings that names it."""
    endpoint: str
    up: bool
    losses: int
    """Streams to it that broke or that it ended."""
