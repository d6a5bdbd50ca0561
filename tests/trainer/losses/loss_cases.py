"""Every divergence that a run can choose, and loss inputs made from full distributions."""

from __future__ import annotations

from torch import Tensor

from student_trainer.learner.batch import contained
from student_trainer.losses import (
    Divergence,
    EntropyAwareKL,
    ForwardKL,
    GeneralizedJSD,
    LocalSupportMatching,
    LossInputs,
    SampledReverseKL,
    StudentTopKReverseKL,
    TruncatedReverseKL,
)

DIVERGENCES: dict[str, Divergence] = {
    "sampled": SampledReverseKL(),
    "matching": LocalSupportMatching(),
    "matching_clipped": LocalSupportMatching(clip_log_ratio=0.5),
    "matching_v2": LocalSupportMatching(support="student_topk_and_sampled"),
    "matching_v3": LocalSupportMatching(support="teacher_topk_and_sampled"),
    "matching_tail": LocalSupportMatching(tail=True),
    "matching_v2_tail": LocalSupportMatching(support="student_topk_and_sampled", tail=True),
    "matching_v3_tail": LocalSupportMatching(support="teacher_topk_and_sampled", tail=True),
    "truncated": TruncatedReverseKL(tail=False),
    "truncated_tail": TruncatedReverseKL(tail=True),
    "forward": ForwardKL(),
    "forward_renormalised": ForwardKL(tail=False),
    "jsd": GeneralizedJSD(),
    "jsd_skewed": GeneralizedJSD(beta=0.1),
    "entropy_aware": EntropyAwareKL(),
    "entropy_aware_tail": EntropyAwareKL(tail=True),
    "only_stu": StudentTopKReverseKL(),
    "only_stu_teacher_p": StudentTopKReverseKL(weight_mode="teacher_p"),
    "only_stu_uniform": StudentTopKReverseKL(weight_mode="uniform"),
    "only_tch": StudentTopKReverseKL(support="only_tch"),
    "intersection": StudentTopKReverseKL(support="intersection"),
    "union": StudentTopKReverseKL(support="union"),
    "union_uniform": StudentTopKReverseKL(support="union", weight_mode="uniform"),
    "symmetric_difference": StudentTopKReverseKL(support="symmetric_difference"),
}
POLICY_GRADIENTS = {
    name
    for name, divergence in DIVERGENCES.items()
    if isinstance(divergence, SampledReverseKL | StudentTopKReverseKL)
}
"""Their value is a surrogate: only the gradient means anything."""


def inputs_from(
    student_BTV: Tensor,
    behavior_BTV: Tensor,
    teacher_BTV: Tensor,
    sampled_BT: Tensor,
    *,
    teacher_ids_BTK: Tensor,
    student_ids_BTJ: Tensor,
    mask_BT: Tensor,
    bad_events_BT: Tensor | None = None,
) -> LossInputs:
    """Gathers what the losses need from the log-probs of three policies over all of V."""
    sampled_BT1 = sampled_BT.unsqueeze(-1)

    def of_sampled(logprobs_BTV: Tensor) -> Tensor:
        return logprobs_BTV.gather(-1, sampled_BT1).squeeze(-1)

    def entropy(logprobs_BTV: Tensor) -> Tensor:
        logprobs_BTV = logprobs_BTV.detach()
        return -(logprobs_BTV.exp() * logprobs_BTV).sum(-1)

    return LossInputs(
        mask_BT=mask_BT,
        behavior_logprobs_BT=of_sampled(behavior_BTV),
        student_logprobs_BT=of_sampled(student_BTV),
        teacher_logprobs_BT=of_sampled(teacher_BTV),
        teacher_topk_logprobs_BTK=teacher_BTV.gather(-1, teacher_ids_BTK),
        student_logprobs_at_teacher_topk_BTK=student_BTV.gather(-1, teacher_ids_BTK),
        behavior_logprobs_at_teacher_topk_BTK=behavior_BTV.gather(-1, teacher_ids_BTK),
        behavior_topk_logprobs_BTJ=behavior_BTV.gather(-1, student_ids_BTJ),
        teacher_logprobs_at_student_topk_BTJ=teacher_BTV.gather(-1, student_ids_BTJ),
        student_logprobs_at_student_topk_BTJ=student_BTV.gather(-1, student_ids_BTJ),
        student_topk_in_teacher_topk_BTJ=contained(student_ids_BTJ, teacher_ids_BTK),
        teacher_topk_in_student_topk_BTK=contained(teacher_ids_BTK, student_ids_BTJ),
        sampled_in_teacher_topk_BT=contained(sampled_BT1, teacher_ids_BTK).squeeze(-1),
        sampled_in_student_topk_BT=contained(sampled_BT1, student_ids_BTJ).squeeze(-1),
        teacher_entropies_BT=entropy(teacher_BTV),
        student_entropies_BT=entropy(student_BTV),
        response_ids_BT=sampled_BT,
        bad_events_BT=bad_events_BT,
    )
