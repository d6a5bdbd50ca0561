"""What a row holds besides what was sampled and scored: KL, overlap, R and their means.

Formulas of rows, for whoever writes them: the trainer, and the analysis of rollouts from anywhere.
Legend as in `schema`. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_wire.drift import reliability
from teacher_wire.drift_metrics import MAX_DRIFT_K
from teacher_wire.records import DriftPolicy

MIN_REST = 1e-7
"""Least mass outside of a list: the rounding of a float32 that is near 1."""
Floats = NDArray[np.float64]


def reverse_kl(student_logprobs: NDArray[Any], teacher_logprobs: NDArray[Any]) -> Floats:
    """[T] of two [T, J] log-probs at the student's top-k: sum over J of q (log q - log p), and over
    all other tokens as if they were one.

    By data processing at least 0 and at most KL(q || p); J = 0 gives 0.
    """
    student, teacher = (a.astype(np.float64) for a in (student_logprobs, teacher_logprobs))
    listed = (np.exp(student) * (student - teacher)).sum(axis=1)
    rest_q, rest_p = (np.maximum(1.0 - np.exp(a).sum(axis=1), MIN_REST) for a in (student, teacher))
    # Two rests of MIN_REST each may leave a rounding below 0.
    total: Floats = np.maximum(listed + rest_q * np.log(rest_q / rest_p), 0.0)
    return total


def overlap_depth(teacher_k: int, num_candidates: int, policy: DriftPolicy | None) -> int:
    """How many leading entries an overlap count compares (teacher_wire.records.ScoreRows)."""
    limit = MAX_DRIFT_K if policy is None else policy.metric.k
    return min(teacher_k, num_candidates, limit, MAX_DRIFT_K)


def reliability_of(
    policy: DriftPolicy | None, bad_events: NDArray[np.bool_] | None
) -> Floats | None:
    """[T] R_t; None without a policy or its events."""
    if policy is None or bad_events is None:
        return None
    return reliability(policy.w_drop, bad_events)


def policy_settings(policy: DriftPolicy) -> dict[str, object]:
    """A drift policy in full, by the names of its settings (`schema.Origin`)."""
    return {
        "metric": policy.metric.name,
        **asdict(policy.metric),
        "w_drop": policy.w_drop,
        "stop_in_flight": policy.stop_in_flight,
    }


def with_means(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the means of its columns; one of no token is None."""
    mask, sampled = row["mask"], row.get("sampled")
    return {
        **row,
        "mean_overlap": mean(row.get("overlap"), sampled),
        "mean_teacher_logprob": mean(row["teacher_logprobs"], mask),
        "mean_reverse_kl": mean(row.get("reverse_kl"), mask),
    }


def mean(values: NDArray[Any] | None, where: NDArray[np.bool_] | None) -> float | None:
    """Of the tokens that are meant; None where there is none, or no values."""
    if values is None:
        return None
    chosen = values if where is None else values[where]
    return float(chosen.mean(dtype=np.float64)) if len(chosen) else None
