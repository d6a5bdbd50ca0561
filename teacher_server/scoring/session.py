"""What the server remembers of a response between appends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teacher_server.metrics.tallies import TenantTally
from teacher_wire import drift
from teacher_wire.records import DriftPolicy, DriftState, ScoreOptions, TokenSpan, Verdict


def engine_name(tenant: str, session_id: str) -> str:
    """Name of a session for the engine; no two tenants share one, whatever their names."""
    return f"{len(tenant)}:{tenant}/{session_id}"


@dataclass(slots=True, eq=False)
class Session:
    """One response that is being scored."""

    session_id: str
    tenant: str
    prompt_ids: NDArray[np.int32]
    options: ScoreOptions
    policy: DriftPolicy | None
    tally: TenantTally
    last_used: float
    background: bool = False
    """What it scores may be held back for others."""
    is_stream: bool = True
    """More follows what it scores."""
    owner: object = None
    """Who opened it last."""
    scored_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Response tokens scored so far, those before the session was opened included."""
    opened_at: DriftState = field(default_factory=DriftState)
    """The tokens that were scored before the session was opened, and their drift."""
    bad: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[len(scored_ids) - opened_at.num_tokens] the bad events since then."""
    num_pending: int = 0
    """Appends waiting or running."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    engine_name: str = field(init=False)

    def __post_init__(self) -> None:
        self.engine_name = engine_name(self.tenant, self.session_id)

    def take_in(
        self, span: TokenSpan, bad: NDArray[np.bool_] | None
    ) -> tuple[DriftState | None, Verdict, int | None]:
        """Adds scored tokens, and forgets those from their offset on; returns what follows from
        all: state, verdict and tokens to keep. `bad` is None without a policy."""
        self.scored_ids = np.concatenate([self.scored_ids[: span.offset], span.token_ids])
        if self.policy is None or bad is None:
            self.tally.unjudged += 1
            return None, Verdict.CONTINUE, None
        earlier = self.bad[: span.offset - self.opened_at.num_tokens]
        self.bad = np.concatenate([earlier, bad])
        return drift.advance(self.policy, self.opened_at, self.bad)
