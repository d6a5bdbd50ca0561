"""The held-out figures: what the teacher makes of responses that the student sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from student_trainer.diagnostics.step import rollout_report, step_profile
from student_trainer.diagnostics.step_report import HeldoutReport
from student_trainer.evaluation.divergence import (
    Estimate,
    Floats,
    forward_kl,
    mass,
    mean_over_tokens,
    reverse_kl,
    sampled_reverse_kl,
)
from student_trainer.records import Finish, Rollout


def heldout_report(rollouts: Sequence[Rollout | None], *, overlap_k: int | None) -> HeldoutReport:
    """Over counted tokens but for lengths and overlap, which are of all; None for a response that
    the teacher said nothing of. `overlap_k` entries are compared, None without candidates."""
    whole = [r for r in rollouts if r is not None and r.finish is not Finish.UNSCORED and len(r)]
    unscored = len(rollouts) - len(whole)
    if not whole:
        return HeldoutReport(responses=0, tokens=0, unscored=unscored)

    def mean(values: Callable[[Rollout], Floats]) -> tuple[float | None, float | None]:
        estimate: Estimate | None = mean_over_tokens(
            [values(rollout)[rollout.mask] for rollout in whole],
            [rollout.prompt.prompt_id for rollout in whole],
        )
        return (estimate.mean, estimate.standard_error) if estimate else (None, None)

    exact, exact_se = mean(reverse_kl)
    sampled, sampled_se = mean(sampled_reverse_kl)
    has_topk = all(rollout.student_topk_ids.shape[1] for rollout in whole)
    forward, forward_se = mean(forward_kl) if has_topk else (None, None)
    logprob, logprob_se = mean(lambda r: r.teacher.token_logprobs.astype(np.float64))
    told = rollout_report(whole, overlap_k=overlap_k)
    profile = step_profile(whole, overlap_k=overlap_k)
    return HeldoutReport(
        responses=len(whole),
        tokens=sum(int(rollout.mask.sum()) for rollout in whole),
        unscored=unscored,
        length=told.length_mean,
        end_rate=told.ended_by_student,
        repetition_rate=told.repetition_rate,
        reverse_kl=exact,
        reverse_kl_se=exact_se,
        sampled_reverse_kl=sampled,
        sampled_reverse_kl_se=sampled_se,
        forward_kl=forward,
        forward_kl_se=forward_se,
        teacher_logprob=logprob,
        teacher_logprob_se=logprob_se,
        student_entropy=mean(lambda r: -r.behavior_logprobs.astype(np.float64))[0],
        student_mass=mean(lambda r: mass(r.student_topk_logprobs))[0] if has_topk else None,
        teacher_mass=mean(lambda r: mass(r.teacher.topk_logprobs))[0],
        overlap=told.overlap,
        band_tokens=None if profile.overlap_by_band is None else profile.band_tokens,
        overlap_by_band=profile.overlap_by_band,
        responses_by_band=profile.rollouts_by_band,
    )
