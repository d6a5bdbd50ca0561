"""Whether the replicas of a teacher give the same rows: each scores one short text before it is
used. No torch, no transport.

What replicas tell of themselves (weights, dtype, tokens) is compared at the handshake; but a model
from a hub has no digest of its weights, and an engine may be set up otherwise. The rows show it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from teacher_wire.errors import FingerprintMismatchError
from teacher_wire.records import TeacherInfo

EXACT_NATS, ROUNDED_NATS = 1e-3, 0.5
"""Default bounds, of float32 and of anything shorter: other batches and other devices round
otherwise, and half-precision logits of 16 to 32 are 0.06 to 0.13 apart."""
MEAN_SHARE = 0.1
"""Of the bound, which the mean difference may be: rounding is large at single tokens only."""
MAX_PROBE_TOKENS = 128

T = TypeVar("T")
Score = Callable[[T, NDArray[np.int32]], Awaitable[NDArray[np.float32]]]
"""Asks over a stream for the log-probs of all but the first of some tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What every replica is asked, and how far apart two may be."""

    token_ids: NDArray[np.int32]
    """Ids beyond a teacher's vocabulary are left out, and what is longer than MAX_PROBE_TOKENS."""
    bound_nats: float | None = None
    """At one token, and MEAN_SHARE of it on average; None: EXACT_NATS or ROUNDED_NATS, by dtype."""

    def of(self, info: TeacherInfo) -> NDArray[np.int32]:
        """The tokens that a teacher is asked."""
        known = self.token_ids[self.token_ids < info.vocab_size]
        return known[: min(MAX_PROBE_TOKENS, info.max_context)]

    def bound(self, info: TeacherInfo) -> float:
        """In nats."""
        if self.bound_nats is not None:
            return self.bound_nats
        return EXACT_NATS if info.dtype == "float32" else ROUNDED_NATS


class Agreement(Generic[T]):
    """Compares replicas with the first one that answered."""

    def __init__(self, probe: Probe, score: Score[T]) -> None:
        self._probe = probe
        self._score = score
        self._first: tuple[str, NDArray[np.float32]] | None = None

    async def check(self, address: str, stream: T, info: TeacherInfo) -> None:
        """Raises FingerprintMismatchError for a replica whose rows are not those of the first."""
        token_ids = self._probe.of(info)
        if len(token_ids) < 2:
            return
        logprobs = await self._score(stream, token_ids)
        if self._first is None:
            self._first = address, logprobs
        first_address, first = self._first
        # Replicas may allow different lengths of text.
        num_rows = min(len(first), len(logprobs))
        gaps = np.abs(first[:num_rows].astype(np.float64) - logprobs[:num_rows])
        worst, mean = int(gaps.argmax()), float(gaps.mean())
        bound = self._probe.bound(info)
        if gaps[worst] <= bound and mean <= MEAN_SHARE * bound:
            return
        raise FingerprintMismatchError(
            f"replicas disagree: of the same {num_rows + 1} tokens {first_address} gives token "
            f"{worst + 1} the log-prob {first[worst]:.4f} and {address} {logprobs[worst]:.4f}, "
            f"{gaps[worst]:.3g} nats apart (mean {mean:.3g}); max_replica_gap_nats is {bound:g}, "
            f"and {MEAN_SHARE * bound:g} on average. Serve the same weights (--revision), dtype "
            "and engine settings from both, name one of them only, or set max_replica_gap_nats "
            "above what they are apart"
        )
