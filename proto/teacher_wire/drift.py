"""The drift of one response and its reliability R (Prune-OPD, arXiv 2605.07804, eq. 5-11).

Pure numpy, no thresholds of its own: every rule comes in a DriftPolicy, and what a bad event is in
its metric (`drift_metrics`). Server, losses and reports all ask here.

    B_t = 1 where the metric finds position t bad and the event mask allows it
    C_t = B_0 + ... + B_t                 a bad token already counts against itself
    R_t = clip(1 - w_drop * C_t, 0, 1)

R reaches 0 at a fixed number of bad events, so the state is a count. That number is computed in one
place, `bad_event_budget`, because 1 - w_drop * C misses 0 by a rounding error for some w_drop.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from teacher_wire.drift_metrics import ROUNDING, Rows
from teacher_wire.records import DriftPolicy, DriftState, Verdict


def bad_event_budget(w_drop: float) -> int:
    """Number of bad events at which R reaches 0: 100 for 0.01, 4 for 0.3."""
    return math.ceil((1.0 - ROUNDING) / w_drop)


def reliability_by_count(w_drop: float, max_count: int) -> NDArray[np.float64]:
    """R after 0, 1, 2, ... bad events, up to where it is 0 or to max_count; float64.

    The only place where R is computed: server, losses and reports look up counts in it, each in its
    own arrays, and so have the same bits. A count beyond the last entry has the last entry's R.
    """
    budget = bad_event_budget(w_drop)
    table = np.clip(1.0 - w_drop * np.arange(min(budget, max_count) + 1), 0.0, 1.0)
    table[budget:] = 0.0
    return table


def bad_events(
    policy: DriftPolicy,
    *,
    token_ids: NDArray[np.int32],
    rows: Rows,
    overlaps: NDArray[np.uint8] | None,
    event_mask: NDArray[np.bool_] | None,
) -> NDArray[np.bool_]:
    """[n] True where the policy sees a bad event; `overlaps` counts the metric's first k."""
    bad = policy.metric.bad_events(token_ids, rows, overlaps)
    return bad if event_mask is None else bad & event_mask


def advance(
    policy: DriftPolicy, state: DriftState, bad: NDArray[np.bool_]
) -> tuple[DriftState, Verdict, int | None]:
    """The state after the tokens of `bad`, the verdict, and with TRUNCATE the tokens to keep.

    Tokens up to and including the one where R reached 0 are kept. The verdict is repeated on every
    later call, and never given when the policy only observes.
    """
    total = state.num_bad_events + int(np.count_nonzero(bad))
    exhausted_at = state.exhausted_at
    budget = bad_event_budget(policy.w_drop)
    if exhausted_at is None and total >= budget:
        missing = budget - state.num_bad_events
        exhausted_at = state.num_tokens + int(np.flatnonzero(bad)[missing - 1]) + 1
    after = DriftState(
        num_tokens=state.num_tokens + len(bad), num_bad_events=total, exhausted_at=exhausted_at
    )
    if exhausted_at is not None and policy.stop_in_flight:
        return after, Verdict.TRUNCATE, exhausted_at
    return after, Verdict.CONTINUE, None


def reliability(w_drop: float, bad: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[n] R_t, exactly 0 from the event on at which the budget is spent."""
    return reliability_by_count(w_drop, len(bad)).take(np.cumsum(bad), mode="clip")


def slow_reliability(w_drop: float, bad: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The definition of R_t, one position at a time, in decimal-safe arithmetic."""
    values, count = [], 0
    for event in bad:
        count += int(event)
        value = min(max(1.0 - w_drop * count, 0.0), 1.0)
        values.append(0.0 if value < ROUNDING else value)
    return np.array(values)
