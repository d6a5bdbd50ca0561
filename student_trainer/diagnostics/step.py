"""Report and profile of one step's rollouts.

"Counted" tokens are those that no special-token mask excludes. What others said between the
student's answers is in no figure: lengths, positions and rates are of the student's tokens. What a
step says nothing about is None, never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_trainer.diagnostics.mismatch import mismatched_tokens
from student_trainer.diagnostics.repetition import repetition_rate
from student_trainer.diagnostics.step_report import RolloutReport, StepProfile
from student_trainer.records import Finish, Rollout

BAND_TOKENS = 16
"""Width of a position band in the overlap profile."""


def rollout_report(rollouts: Sequence[Rollout], *, overlap_k: int | None) -> RolloutReport:
    """What one step's rollouts were; `overlap_k` entries are compared, None without candidates."""
    lengths = np.array([r.num_sampled for r in rollouts])
    effective = np.array(effective_lengths(rollouts))
    truncated = [r for r in rollouts if r.finish is Finish.TRUNCATED]
    overshoot = sum(r.overshoot_tokens for r in truncated)
    rates = [repetition_rate(r.of_student(r.response_ids)) for r in rollouts]
    first, middle, last, absolute = _disagreement(rollouts)
    return RolloutReport(
        rollouts=len(rollouts),
        generated_tokens=sum(r.num_generated for r in rollouts),
        kept_tokens=int(lengths.sum()),
        length_mean=float(lengths.mean()),
        length_p90=float(np.quantile(lengths, 0.9)),
        staleness_min_version=min(r.policy_version for r in rollouts),
        truncated_rollouts=len(truncated),
        partly_scored_rollouts=sum(r.finish is Finish.UNSCORED for r in rollouts),
        truncation_rate=len(truncated) / len(rollouts),
        ended_by_student=float(np.mean([r.finish is Finish.STOP for r in rollouts])),
        ended_by_length=float(np.mean([r.finish is Finish.LENGTH for r in rollouts])),
        overshoot_tokens=overshoot,
        overshoot_mean=overshoot / len(truncated) if truncated else None,
        overshoot_bound_mean=_overshoot_bound(truncated),
        effective_length_mean=float(effective.mean()),
        effective_length_p50=float(np.quantile(effective, 0.5)),
        effective_length_p90=float(np.quantile(effective, 0.9)),
        overlap=_overlap(rollouts, overlap_k),
        bad_event_rate=_bad_event_rate(rollouts),
        exhausted_rate=_exhausted_rate(rollouts),
        unreliable_share=_unreliable_share(rollouts, int(effective.sum())),
        reverse_kl_first_third=first,
        reverse_kl_middle_third=middle,
        reverse_kl_last_third=last,
        behavior_entropy=_behavior_entropy(rollouts),
        abs_advantage_per_response=absolute / len(rollouts),
        mismatched_token_ids=len(mismatched_tokens(rollouts)),
        repetition_rate=float(np.mean(rates)),
        repetition_rate_p90=float(np.quantile(rates, 0.9)),
    )


def phase_seconds(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Seconds from the first start to the last token, and from there to the last score."""
    started = min(r.times.started_s for r in rollouts)
    generated = max(r.times.generated_s for r in rollouts)
    scored = max(r.times.scored_s for r in rollouts)
    return generated - started, max(0.0, scored - generated)


def step_profile(rollouts: Sequence[Rollout], *, overlap_k: int | None) -> StepProfile:
    """Lengths and ends of every rollout, overlap by position band, mismatched tokens."""
    profile = StepProfile(
        lengths=[r.num_sampled for r in rollouts],
        generated=[r.num_generated for r in rollouts],
        finish=[r.finish.value for r in rollouts],
        mismatched_tokens=mismatched_tokens(rollouts),
        band_tokens=BAND_TOKENS,
    )
    if overlap_k is None:
        return profile
    longest = max(profile.lengths)
    sums, counts = np.zeros(longest), np.zeros(longest)
    for rollout, length in zip(rollouts, profile.lengths, strict=True):
        sums[:length] += _array(rollout, "overlap_counts") / overlap_k
        counts[:length] += 1
    starts = np.arange(0, longest, BAND_TOKENS)
    banded = np.add.reduceat(sums, starts) / np.add.reduceat(counts, starts)
    return replace(
        profile,
        overlap_by_band=[round(float(value), 4) for value in banded],
        rollouts_by_band=[int(counts[start]) for start in starts],
    )


def effective_lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """E of Prune-OPD: counted tokens with reliability above 0, those before R reached 0."""
    return [int(r.mask[: _reliable_tokens(r)].sum()) for r in rollouts]


def lengths_in_budget(rollouts: Sequence[Rollout]) -> list[int]:
    """E, and what others said before R reached 0: the budget holds both. Of the rollouts whose
    length the student and its teacher have settled: not of those that the teacher left."""
    return [
        length if r.sampled is None else length + int((~r.sampled[: _reliable_tokens(r)]).sum())
        for r, length in zip(rollouts, effective_lengths(rollouts), strict=True)
        if r.finish is not Finish.UNSCORED
    ]


def _reliable_tokens(rollout: Rollout) -> int:
    if rollout.drift is None or rollout.drift.exhausted_at is None:
        return len(rollout)
    return rollout.drift.exhausted_at - 1


def _overshoot_bound(truncated: Sequence[Rollout]) -> float | None:
    """The deciding append plus what was generated during its round trip, mean; None for none."""
    bounds = [r.times.verdict_span_tokens + r.times.round_trip_tokens for r in truncated]
    return float(np.mean(bounds)) if bounds else None


def _overlap(rollouts: Sequence[Rollout], overlap_k: int | None) -> float | None:
    if overlap_k is None or not any(map(len, rollouts)):
        return None
    return float(np.mean(_joined(rollouts, "overlap_counts"))) / overlap_k


def _behavior_entropy(rollouts: Sequence[Rollout]) -> float | None:
    """Mean of -log p_behavior of the sampled tokens that count: an estimate, without bias."""
    logprobs = np.concatenate([r.behavior_logprobs[r.mask] for r in rollouts])
    return -float(logprobs.mean(dtype=np.float64)) if len(logprobs) else None


def _bad_event_rate(rollouts: Sequence[Rollout]) -> float | None:
    if any(r.teacher.bad_events is None for r in rollouts) or not any(map(len, rollouts)):
        return None
    return float(np.mean(_joined(rollouts, "bad_events")))


def _exhausted_rate(rollouts: Sequence[Rollout]) -> float | None:
    states = [r.drift for r in rollouts if r.drift is not None]
    if len(states) < len(rollouts):
        return None
    return float(np.mean([state.exhausted_at is not None for state in states]))


def _unreliable_share(rollouts: Sequence[Rollout], num_effective: int) -> float | None:
    counted = sum(int(r.mask.sum()) for r in rollouts)
    if any(r.drift is None for r in rollouts) or counted == 0:
        return None
    return 1.0 - num_effective / counted


def _disagreement(
    rollouts: Sequence[Rollout],
) -> tuple[float | None, float | None, float | None, float]:
    """From A_t = log p_teacher - log p_behavior of the sampled tokens that count.

    The mean of -A in each third of what the student said, None where no token counts, and the sum
    of |A|.
    """
    sums, counts, absolute = np.zeros(3), np.zeros(3), 0.0
    for rollout in rollouts:
        gaps = rollout.behavior_logprobs.astype(np.float64) - rollout.teacher.token_logprobs
        gaps = gaps[rollout.mask]
        counted = np.flatnonzero(rollout.of_student(rollout.mask))
        thirds = counted * 3 // max(1, rollout.num_sampled)
        sums += np.bincount(thirds, weights=gaps, minlength=3)
        counts += np.bincount(thirds, minlength=3)
        absolute += float(np.abs(gaps).sum())
    first, middle, last = (
        float(total / count) if count else None for total, count in zip(sums, counts, strict=True)
    )
    return first, middle, last, absolute


def _array(rollout: Rollout, name: str) -> NDArray[Any]:
    array: NDArray[Any] | None = getattr(rollout.teacher, name)
    if array is None:
        raise ValueError(f"rollout of {rollout.prompt.prompt_id}: the teacher sent no {name}")
    return rollout.of_student(array)


def _joined(rollouts: Sequence[Rollout], name: str) -> NDArray[Any]:
    return np.concatenate([_array(r, name) for r in rollouts])
