"""What a batch of rollouts says about drift, waste and time. Pure; the loop logs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from student_trainer.records import Finish, Rollout

BAND_TOKENS = 16
"""Width of a position band in the overlap profile."""


def rollout_metrics(rollouts: Sequence[Rollout], *, overlap_k: int | None) -> dict[str, float]:
    """Scalars of one step. Token counts are totals, lengths and rates are means."""
    truncated = [r for r in rollouts if r.finish is Finish.TRUNCATED]
    lengths = np.array([len(r) for r in rollouts])
    metrics = {
        "rollouts": len(rollouts),
        "truncated_rollouts": len(truncated),
        "generated_tokens": sum(r.num_generated for r in rollouts),
        "kept_tokens": int(lengths.sum()),
        "overshoot_tokens": sum(r.overshoot_tokens for r in truncated),
        "length_mean": float(lengths.mean()),
        "length_p90": float(np.quantile(lengths, 0.9)),
        "ended_by_student": float(np.mean([r.finish is Finish.STOP for r in rollouts])),
        "staleness_min_version": min(r.policy_version for r in rollouts),
    }
    if truncated:
        metrics["overshoot_mean"] = metrics["overshoot_tokens"] / len(truncated)
        metrics["overshoot_bound_mean"] = float(
            np.mean([r.times.verdict_span_tokens + r.times.round_trip_tokens for r in truncated])
        )
    if overlap_k is not None:
        metrics["overlap"] = float(np.mean(_joined(rollouts, "overlap_counts"))) / overlap_k
    if rollouts[0].teacher.bad_events is not None:
        metrics["bad_event_rate"] = float(np.mean(_joined(rollouts, "bad_events")))
    return metrics


def phase_seconds(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Seconds from the first start to the last token, and from there to the last score."""
    started = min(r.times.started_s for r in rollouts)
    generated = max(r.times.generated_s for r in rollouts)
    scored = max(r.times.scored_s for r in rollouts)
    return generated - started, max(0.0, scored - generated)


def step_profile(rollouts: Sequence[Rollout], *, overlap_k: int | None) -> dict[str, Any]:
    """Lengths and ends of every rollout, and the mean overlap by position band; for the report."""
    profile: dict[str, Any] = {
        "lengths": [len(r) for r in rollouts],
        "generated": [r.num_generated for r in rollouts],
        "finish": [r.finish.value for r in rollouts],
        "band_tokens": BAND_TOKENS,
        "overlap_by_band": None,
    }
    if overlap_k is None:
        return profile
    longest = max(len(r) for r in rollouts)
    sums, counts = np.zeros(longest), np.zeros(longest)
    for rollout in rollouts:
        sums[: len(rollout)] += _array(rollout, "overlap_counts") / overlap_k
        counts[: len(rollout)] += 1
    starts = np.arange(0, longest, BAND_TOKENS)
    banded = np.add.reduceat(sums, starts) / np.add.reduceat(counts, starts)
    profile["overlap_by_band"] = [round(float(value), 4) for value in banded]
    profile["rollouts_by_band"] = [int(counts[start]) for start in starts]
    return profile


def effective_lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """Counted tokens with reliability above 0 (E of Prune-OPD): those before R reached 0."""
    return [int(r.mask[: _reliable_tokens(r)].sum()) for r in rollouts]


def _reliable_tokens(rollout: Rollout) -> int:
    if rollout.drift is None or rollout.drift.exhausted_at is None:
        return len(rollout)
    return rollout.drift.exhausted_at - 1


def _array(rollout: Rollout, name: str) -> np.ndarray:
    array = getattr(rollout.teacher, name)
    if array is None:
        raise ValueError(f"rollout of {rollout.prompt.prompt_id}: the teacher sent no {name}")
    return array


def _joined(rollouts: Sequence[Rollout], name: str) -> np.ndarray:
    return np.concatenate([_array(r, name) for r in rollouts])
