"""Scalars and profile of one step's rollouts.

"Counted" tokens are those that no special-token mask excludes. A metric that the step says nothing
about is left out, never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_trainer.diagnostics.mismatch import mismatched_tokens
from student_trainer.diagnostics.repetition import repetition_rate
from student_trainer.records import Finish, Rollout

BAND_TOKENS = 16
"""Width of a position band in the overlap profile."""
THIRDS = ("first", "middle", "last")


def rollout_metrics(rollouts: Sequence[Rollout], *, overlap_k: int | None) -> dict[str, float]:
    """Scalars of one step. Token counts are totals, lengths and rates are means."""
    lengths = np.array([len(r) for r in rollouts])
    return {
        "rollouts": len(rollouts),
        "generated_tokens": sum(r.num_generated for r in rollouts),
        "kept_tokens": int(lengths.sum()),
        "length_mean": float(lengths.mean()),
        "length_p90": float(np.quantile(lengths, 0.9)),
        "staleness_min_version": min(r.policy_version for r in rollouts),
        **_ends(rollouts),
        **_drift(rollouts, overlap_k),
        **_disagreement(rollouts),
        **_repetition(rollouts),
    }


def phase_seconds(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Seconds from the first start to the last token, and from there to the last score."""
    started = min(r.times.started_s for r in rollouts)
    generated = max(r.times.generated_s for r in rollouts)
    scored = max(r.times.scored_s for r in rollouts)
    return generated - started, max(0.0, scored - generated)


def step_profile(rollouts: Sequence[Rollout], *, overlap_k: int | None) -> dict[str, Any]:
    """Lengths and ends of every rollout, overlap by position band, mismatched tokens."""
    longest = max(len(r) for r in rollouts)
    profile: dict[str, Any] = {
        "lengths": [len(r) for r in rollouts],
        "generated": [r.num_generated for r in rollouts],
        "finish": [r.finish.value for r in rollouts],
        "mismatched_tokens": mismatched_tokens(rollouts),
        "band_tokens": BAND_TOKENS,
        "overlap_by_band": None,
    }
    if overlap_k is None:
        return profile
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
    """E of Prune-OPD: counted tokens with reliability above 0, those before R reached 0."""
    return [int(r.mask[: _reliable_tokens(r)].sum()) for r in rollouts]


def _reliable_tokens(rollout: Rollout) -> int:
    if rollout.drift is None or rollout.drift.exhausted_at is None:
        return len(rollout)
    return rollout.drift.exhausted_at - 1


def _ends(rollouts: Sequence[Rollout]) -> dict[str, float]:
    truncated = [r for r in rollouts if r.finish is Finish.TRUNCATED]
    metrics: dict[str, float] = {
        "truncated_rollouts": len(truncated),
        "partly_scored_rollouts": sum(r.finish is Finish.UNSCORED for r in rollouts),
        "truncation_rate": len(truncated) / len(rollouts),
        "ended_by_student": float(np.mean([r.finish is Finish.STOP for r in rollouts])),
        "ended_by_length": float(np.mean([r.finish is Finish.LENGTH for r in rollouts])),
        "overshoot_tokens": sum(r.overshoot_tokens for r in truncated),
    }
    if truncated:
        metrics["overshoot_mean"] = metrics["overshoot_tokens"] / len(truncated)
        metrics["overshoot_bound_mean"] = float(
            np.mean([r.times.verdict_span_tokens + r.times.round_trip_tokens for r in truncated])
        )
    return metrics


def _drift(rollouts: Sequence[Rollout], overlap_k: int | None) -> dict[str, float]:
    effective = np.array(effective_lengths(rollouts))
    metrics = {
        "effective_length_mean": float(effective.mean()),
        "effective_length_p50": float(np.quantile(effective, 0.5)),
        "effective_length_p90": float(np.quantile(effective, 0.9)),
    }
    if overlap_k is not None and any(map(len, rollouts)):
        metrics["overlap"] = float(np.mean(_joined(rollouts, "overlap_counts"))) / overlap_k
    if all(r.teacher.bad_events is not None for r in rollouts) and any(map(len, rollouts)):
        metrics["bad_event_rate"] = float(np.mean(_joined(rollouts, "bad_events")))
    states = [r.drift for r in rollouts if r.drift is not None]
    if len(states) == len(rollouts):
        metrics["exhausted_rate"] = float(np.mean([s.exhausted_at is not None for s in states]))
        if counted := sum(int(r.mask.sum()) for r in rollouts):
            metrics["unreliable_share"] = 1.0 - int(effective.sum()) / counted
    return metrics


def _disagreement(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """From A_t = log p_teacher - log p_behavior of the sampled tokens that count."""
    sums, counts, absolute = np.zeros(3), np.zeros(3), 0.0
    for rollout in rollouts:
        gaps = rollout.behavior_logprobs.astype(np.float64) - rollout.teacher.token_logprobs
        gaps = gaps[rollout.mask]
        thirds = np.flatnonzero(rollout.mask) * 3 // max(1, len(rollout))
        sums += np.bincount(thirds, weights=gaps, minlength=3)
        counts += np.bincount(thirds, minlength=3)
        absolute += float(np.abs(gaps).sum())
    metrics = {
        f"reverse_kl_{name}_third": float(total / count)
        for name, total, count in zip(THIRDS, sums, counts, strict=True)
        if count
    }
    return metrics | {
        "abs_advantage_per_response": absolute / len(rollouts),
        "mismatched_token_ids": len(mismatched_tokens(rollouts)),
    }


def _repetition(rollouts: Sequence[Rollout]) -> dict[str, float]:
    rates = [repetition_rate(r.response_ids) for r in rollouts]
    return {
        "repetition_rate": float(np.mean(rates)),
        "repetition_rate_p90": float(np.quantile(rates, 0.9)),
    }


def _array(rollout: Rollout, name: str) -> NDArray[Any]:
    array: NDArray[Any] | None = getattr(rollout.teacher, name)
    if array is None:
        raise ValueError(f"rollout of {rollout.prompt.prompt_id}: the teacher sent no {name}")
    return array


def _joined(rollouts: Sequence[Rollout], name: str) -> NDArray[Any]:
    return np.concatenate([_array(r, name) for r in rollouts])
