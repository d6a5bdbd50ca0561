"""One response that is being scored: what the server remembers of it between appends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teacher_server.metrics.tallies import TenantTally
from teacher_wire import drift
from teacher_wire.records import DriftPolicy, DriftState, ScoreOptions, Verdict


@dataclass(slots=True, eq=False)
class Session:
    """One response that is being scored."""

    session_id: str
    tenant: str
    prompt_ids: NDArray[np.int32]
    options: ScoreOptions
    policy: DriftPolicy | None
    scored_ids: NDArray[np.int32]
    """Response tokens scored so far, those before the session was opened included."""
    base: int
    """Response tokens that were scored before the session was opened."""
    base_drift: DriftState
    bad: NDArray[np.bool_]
    """[len(scored_ids) - base] the bad events since then."""
    last_used: float
    owner: object
    """Who opened it last."""
    tally: TenantTally
    num_pending: int = 0
    """Appends waiting or running."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def engine_name(self) -> str:
        """Name of the session for the engine; no two tenants share one, whatever their names."""
        return f"{len(self.tenant)}:{self.tenant}/{self.session_id}"

    def rewind(self, offset: int) -> None:
        """Forgets the tokens from `offset` on."""
        self.scored_ids = self.scored_ids[:offset]
        self.bad = self.bad[: offset - self.base]

    def drift_after(self, bad: NDArray[np.bool_]) -> tuple[DriftState | None, Verdict, int | None]:
        """State, verdict and tokens to keep after these bad events since the session was opened."""
        if self.policy is None:
            return None, Verdict.CONTINUE, None
        return drift.advance(self.policy, self.base_drift, bad)
