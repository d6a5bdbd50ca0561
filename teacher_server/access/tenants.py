"""Who shares a teacher, and how much of it each may have. Knows no transport and no secret."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One trainer, team or job that a teacher tells apart from the others."""

    name: str
    weight: float = 1.0
    """Share of the engine against other tenants that are waiting, in tokens."""
    max_sessions: int | None = None
    """Open sessions; None for the server's own limit only."""
    max_tokens_in_flight: int | None = None
    """New tokens that wait for the engine or are in it."""
    tokens_per_minute: int | None = None
    """New tokens admitted, as a token bucket that holds one minute's worth."""
    runs: bool = False
    """Sees the recorded rollouts that the server shows."""


class Tenants(Protocol):
    """Looks a tenant up; may change while the server runs."""

    def get(self, name: str) -> Tenant: ...


class OpenTenants:
    """Every name is a tenant with no limits of its own, and sees all."""

    def get(self, name: str) -> Tenant:
        return Tenant(name=name, runs=True)
