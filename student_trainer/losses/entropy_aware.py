"""Entropy-aware OPD: the forward KL beside a reverse KL where the teacher is unsure.

Shape legend and alignment as in `divergences`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.settings import loss as constants

from .checks import check_log_probs
from .divergences import (
    at_teacher_topk,
    check_pair,
    forward_kl,
    local_support_matching,
    mass_outside,
    truncated_reverse_kl,
)
from .inputs import LossInputs, need
from .policy_gradients import sampled_reverse_kl


def entropy_aware_kl(
    student_logprobs_BTK: Tensor,
    teacher_logprobs_BTK: Tensor,
    teacher_entropies_BT: Tensor,
    *,
    entropy_threshold: float,
    tail: bool,
    coefficient: float = 1.0,
    reverse_BT: Tensor | None = None,
    student_log_outside_BT: Tensor | None = None,
) -> Tensor:
    """Reverse KL at every position, plus the forward KL where the teacher is unsure.

    KL(student || teacher) + coefficient 1[H(teacher) >= entropy_threshold] KL(teacher || student),
    H in nats of the teacher's full distribution; >= 0. tail=False: the reverse KL is
    `local_support_matching`, E_{v ~ student | S}[log p_student(v | S) - log p_teacher(v | S)], and
    the forward KL that of the teacher renormalised on S against the student over V,
    `forward_kl(tail=False)`. tail=True: both over K + 1 classes. Both equal the exact sum at K = V.

    Source: arXiv 2603.07079 (entropy-aware OPD). Its released code has another reverse KL, the
    clipped surrogate of the sampled token (`policy_gradients.sampled_reverse_kl`), given as
    `reverse_BT`; with it, tail=False, K = 16, a threshold of 0.8 nats and a coefficient of 1 this
    is its objective, whose value is no divergence.

    Args and errors as in `forward_kl`; teacher_entropies_BT carries no gradient.
    """
    check_pair(student_logprobs_BTK, teacher_logprobs_BTK)
    check_log_probs(2, student={}, fixed={"teacher_entropies_BT": teacher_entropies_BT})
    if teacher_entropies_BT.shape != student_logprobs_BTK.shape[:2]:
        raise ValueError(
            f"teacher_entropies_BT has shape {tuple(teacher_entropies_BT.shape)}, "
            f"student_logprobs_BTK has shape {tuple(student_logprobs_BTK.shape)}"
        )
    pair, outside = (student_logprobs_BTK, teacher_logprobs_BTK), student_log_outside_BT
    if reverse_BT is None and tail:
        reverse_BT = truncated_reverse_kl(*pair, tail=True, student_log_outside_BT=outside)
    elif reverse_BT is None:
        reverse_BT = local_support_matching(*pair)
    forward_BT = forward_kl(*pair, tail=tail, student_log_outside_BT=outside)
    unsure_BT = teacher_entropies_BT >= entropy_threshold
    return reverse_BT + coefficient * forward_BT.masked_fill(~unsure_BT, 0.0)


class EntropyAwareKL(constants.EntropyAwareKLSettings):
    """`entropy_aware_kl` over the teacher's top-K; its reverse KL there too, or of the sampled
    token."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        reverse_BT = None
        if self.reverse == "sampled":
            reverse_BT = sampled_reverse_kl(
                inputs.student_logprobs_BT,
                inputs.behavior_logprobs_BT,
                inputs.teacher_logprobs_BT,
                clip_epsilon=self.clip_epsilon,
                dual_clip=self.dual_clip,
            )
        loss_BT = entropy_aware_kl(
            *at_teacher_topk(inputs),
            need(inputs.teacher_entropies_BT, "teacher_entropies_BT"),
            entropy_threshold=self.entropy_threshold,
            tail=self.tail,
            coefficient=self.coefficient,
            reverse_BT=reverse_BT,
            student_log_outside_BT=mass_outside(inputs, self.tail),
        )
        return torch.where(inputs.mask_BT, loss_BT, 0.0)


KINDS = (EntropyAwareKL,)
