"""Reports of steps as tests need them: whole, plain, with what matters changed."""

from __future__ import annotations

from dataclasses import replace

from student_trainer.diagnostics.step import step_profile
from student_trainer.diagnostics.step_report import (
    MismatchedToken,
    SampleText,
    StepProfile,
    StepReport,
)
from student_trainer.records import Rollout

VALUES: dict[str, float | None] = {
    "loss": 0.5,
    "loss_tokens": 1000.0,
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "updates": 1,
    "reverse_kl": 0.25,
    "student_mass_at_teacher_topk": 0.95,
    "weight_min": 0.5,
    "weight_mean": 1.0,
    "weight_max": 1.5,
    "rollouts": 4,
    "generated_tokens": 100,
    "kept_tokens": 100,
    "length_mean": 20.0,
    "length_p90": 20.0,
    "staleness_min_version": 0,
    "truncated_rollouts": 0,
    "partly_scored_rollouts": 0,
    "truncation_rate": 0.0,
    "ended_by_student": 1.0,
    "ended_by_length": 0.0,
    "overshoot_tokens": 0,
    "effective_length_mean": 200.0,
    "effective_length_p50": 200.0,
    "effective_length_p90": 200.0,
    "bad_event_rate": 0.3,
    "exhausted_rate": 0.6,
    "unreliable_share": 0.4,
    "abs_advantage_per_response": 1.0,
    "mismatched_token_ids": 0,
    "repetition_rate": 0.02,
    "repetition_rate_p90": 0.02,
    "unscored_rollouts": 0,
    "sync_gap_nats": 1e-6,
    "seconds_generate": 1.0,
    "seconds_teacher_wait": 0.25,
    "seconds_learn": 0.5,
    "seconds_sync": 0.25,
}
"""A healthy step of four rollouts."""


def step_report(
    step: int = 1,
    rollouts: list[Rollout] | None = None,
    samples: tuple[SampleText, ...] = (),
    **changes: float | None,
) -> StepReport:
    """The healthy step with changes by field, and with the profile of rollouts if there are any."""
    report = replace(StepReport.from_values(step, VALUES | changes), samples=samples)
    if rollouts is None:
        return report
    with_overlap = all(rollout.teacher.overlap_counts is not None for rollout in rollouts)
    profile = step_profile(rollouts, overlap_k=4 if with_overlap else None)
    return replace(report, profile=profile)


def profile_of_one_token(*mismatched: MismatchedToken) -> StepProfile:
    """Of a step with one response of one token, half of whose overlap is there."""
    return StepProfile(
        lengths=[1],
        generated=[1],
        finish=["stop"],
        mismatched_tokens=[*mismatched],
        band_tokens=16,
        overlap_by_band=[0.5],
        rollouts_by_band=[1],
    )
