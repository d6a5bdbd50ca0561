"""Overlap, bad events and the drift of one response (Prune-OPD, arXiv 2605.07804, eq. 5-11).

Pure numpy, no thresholds of its own: every rule comes in a DriftPolicy.

Legend: n = rows, K = the teacher's top-k, C = candidates (the student's own top-k).

    O_t = |first k candidates and first k of the teacher in common| / k
    B_t = 1 where O_t < threshold and the event mask allows it
    C_t = B_0 + ... + B_t                 a bad token already counts against itself
    R_t = clip(1 - w_drop * C_t, 0, 1)

R reaches 0 at a fixed number of bad events, so the state is a count. That number is computed in one
place, `bad_event_budget`, because 1 - w_drop * C misses 0 by a rounding error for some w_drop.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from teacher_wire.records import DriftMetric, DriftPolicy, DriftState, Verdict

_ROUNDING = 1e-9
"""Slack, relative, for a product or quotient of two doubles that is an integer on paper."""

_ROW_BLOCK = 256
"""Rows compared at a time, which bounds the memory of an append."""


def bad_event_budget(w_drop: float) -> int:
    """Number of bad events at which R reaches 0: 100 for 0.01, 4 for 0.3."""
    return math.ceil((1.0 - _ROUNDING) / w_drop)


def min_overlap_count(policy: DriftPolicy) -> int:
    """Smallest overlap count that is not a bad event: 12 of 16 for a threshold of 0.7."""
    return math.ceil(policy.threshold * policy.k * (1.0 - _ROUNDING))


def overlap_counts(
    student_ids: NDArray[np.int32], teacher_ids: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """[n] sizes of the common set of two [n, k] lists of ids; order and repeats do not matter.

    The student's id becomes 2 * id, the teacher's 2 * id + 1. In sorted order an id that both have
    is a neighbouring pair that differs in the last bit alone, and is that pair once.
    """
    counts = np.empty(len(teacher_ids), np.uint8)
    k = student_ids.shape[1]
    for start in range(0, len(counts), _ROW_BLOCK):
        rows = slice(start, start + _ROW_BLOCK)
        keys = np.empty((len(counts[rows]), 2 * k), np.uint32)
        keys[:, :k], keys[:, k:] = student_ids[rows], teacher_ids[rows]
        keys <<= 1
        keys[:, k:] |= 1
        keys.sort(axis=1)
        is_pair = (keys[:, 1:] ^ keys[:, :-1]) == 1
        np.add.reduce(is_pair, axis=1, out=counts[rows])
    return counts


def slow_overlap_counts(
    student_ids: NDArray[np.int32], teacher_ids: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """The definition of overlap_counts, written out."""
    counts = [
        len(set(student.tolist()) & set(teacher.tolist()))
        for student, teacher in zip(student_ids, teacher_ids, strict=True)
    ]
    return np.array(counts, np.uint8)


def outside_nucleus(
    token_ids: NDArray[np.int32],
    topk_ids: NDArray[np.int32],
    topk_logprobs: NDArray[np.float32],
    top_p: float,
) -> NDArray[np.bool_]:
    """[n] True where the token is not in the nucleus of the teacher's sorted top-k.

    The nucleus is the smallest prefix whose cumulative mass is >= top_p; the whole top-k when its
    mass never gets there. An entry is in it while the mass before it is still below top_p.
    """
    mass = np.cumsum(np.exp(topk_logprobs.astype(np.float64)), axis=1)
    in_nucleus = np.ones(topk_ids.shape, np.bool_)
    in_nucleus[:, 1:] = mass[:, :-1] < top_p
    accepted: NDArray[np.bool_] = ((topk_ids == token_ids[:, None]) & in_nucleus).any(axis=1)
    return ~accepted


def slow_outside_nucleus(
    token_ids: NDArray[np.int32],
    topk_ids: NDArray[np.int32],
    topk_logprobs: NDArray[np.float32],
    top_p: float,
) -> NDArray[np.bool_]:
    """The definition of outside_nucleus, written out."""
    outside = []
    for token, ids, logprobs in zip(token_ids, topk_ids, topk_logprobs, strict=True):
        nucleus, mass = set(), 0.0
        for candidate, logprob in zip(ids, logprobs, strict=True):
            nucleus.add(int(candidate))
            mass += math.exp(float(logprob))
            if mass >= top_p:
                break
        outside.append(int(token) not in nucleus)
    return np.array(outside, np.bool_)


def bad_events(
    policy: DriftPolicy,
    *,
    token_ids: NDArray[np.int32],
    topk_ids: NDArray[np.int32],
    topk_logprobs: NDArray[np.float32],
    overlaps: NDArray[np.uint8] | None,
    event_mask: NDArray[np.bool_] | None,
) -> NDArray[np.bool_]:
    """[n] True where the policy sees a bad event; `overlaps` counts the first policy.k entries.

    TEACHER_TOP_P_ACCEPT looks at the first policy.k entries of the teacher's top-k.
    """
    if policy.metric is DriftMetric.OVERLAP_RATIO:
        if overlaps is None:
            raise ValueError("overlap_ratio needs overlap counts")
        bad = overlaps < min_overlap_count(policy)
    else:
        visible = slice(policy.k)
        bad = outside_nucleus(
            token_ids, topk_ids[:, visible], topk_logprobs[:, visible], policy.top_p
        )
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


def reliability(
    w_drop: float, bad: NDArray[np.bool_], *, earlier_bad_events: int = 0
) -> NDArray[np.float64]:
    """[n] R_t, exactly 0 from the event on at which the budget is spent."""
    counts = earlier_bad_events + np.cumsum(bad)
    reliable = np.clip(1.0 - w_drop * counts, 0.0, 1.0)
    return np.where(counts >= bad_event_budget(w_drop), 0.0, reliable)


def slow_reliability(w_drop: float, bad: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The definition of R_t, one position at a time, in decimal-safe arithmetic."""
    values, count = [], 0
    for event in bad:
        count += int(event)
        value = min(max(1.0 - w_drop * count, 0.0), 1.0)
        values.append(0.0 if value < _ROUNDING else value)
    return np.array(values)
