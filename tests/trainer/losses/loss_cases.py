"""Every divergence that a run can choose, and random policies to try it on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from student_trainer.losses import LossInputs
from student_trainer.losses.divergences import (
    ForwardKL,
    GeneralizedJSD,
    LocalSupportMatching,
    TruncatedReverseKL,
)
from student_trainer.losses.entropy_aware import EntropyAwareKL
from student_trainer.losses.gates import span_gates
from student_trainer.losses.laws import inputs_of
from student_trainer.losses.objective import Divergence
from student_trainer.losses.policy_gradients import (
    ResidualReverseKL,
    SampledReverseKL,
    StudentTopKReverseKL,
)
from student_trainer.losses.spans import block_spans

SHAPE, VOCABULARY, K, J = (2, 4), 9, 3, 4

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
    "entropy_aware_sampled": EntropyAwareKL(reverse="sampled"),
    "only_stu": StudentTopKReverseKL(),
    "only_stu_teacher_p": StudentTopKReverseKL(weight_mode="teacher_p"),
    "only_stu_uniform": StudentTopKReverseKL(weight_mode="uniform"),
    "only_tch": StudentTopKReverseKL(support="only_tch"),
    "intersection": StudentTopKReverseKL(support="intersection"),
    "union": StudentTopKReverseKL(support="union"),
    "union_uniform": StudentTopKReverseKL(support="union", weight_mode="uniform"),
    "symmetric_difference": StudentTopKReverseKL(support="symmetric_difference"),
    "sampled_baseline": SampledReverseKL(baseline="student_topk"),
    "residual": ResidualReverseKL(),
}
POLICY_GRADIENTS = {name for name, divergence in DIVERGENCES.items() if divergence.has_a_ratio}
"""Their value is a surrogate: only the gradient means anything."""


@dataclasses.dataclass
class Case:
    """Three policies over all of V and who named which candidates; student logits are the leaf."""

    logits_BTV: Tensor
    behavior_BTV: Tensor
    teacher_BTV: Tensor
    sampled_BT: Tensor
    teacher_ids_BTK: Tensor
    student_ids_BTJ: Tensor

    def inputs(self, **changes: Any) -> LossInputs:
        """As a batch hands them over, without padding."""
        return inputs_of(
            self.logits_BTV.log_softmax(-1),
            self.behavior_BTV,
            self.teacher_BTV,
            self.sampled_BT,
            teacher_ids_BTK=self.teacher_ids_BTK,
            student_ids_BTJ=self.student_ids_BTJ,
            **{"mask_BT": torch.ones_like(self.sampled_BT, dtype=torch.bool)} | changes,
        )

    def inputs_for(self, divergence: Any) -> LossInputs:
        """With the mass outside the support that a divergence names."""
        return self.inputs(mass_outside=divergence.needs.mass_outside)


def case(
    seed: int,
    *,
    k: int = K,
    j: int = J,
    off_policy: float = 0.3,
    shape: tuple[int, int] = SHAPE,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    behavior, teacher, step = (
        torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
        * torch.tensor(scale, dtype=torch.float64)
        for scale in (1.5, 1.5, off_policy)
    )
    logits = (behavior + step).requires_grad_()
    behavior, teacher = behavior.log_softmax(-1), teacher.log_softmax(-1)
    return Case(
        logits_BTV=logits,
        behavior_BTV=behavior,
        teacher_BTV=teacher,
        sampled_BT=torch.randint(VOCABULARY, shape, generator=generator),
        teacher_ids_BTK=teacher.topk(k).indices,
        student_ids_BTJ=behavior.topk(j).indices,
    )


def gradient(loss_BT: Tensor, leaf: Tensor) -> Tensor:
    """Of a differently weighted sum over positions, so that no two positions may be swapped."""
    coefficients = torch.arange(1, loss_BT.numel() + 1, dtype=loss_BT.dtype).view_as(loss_BT)
    (found,) = torch.autograd.grad((coefficients * loss_BT).sum(), leaf, retain_graph=True)
    return found


def block_gates(student: Tensor, behavior: Tensor, mask: Tensor, **constants: Any) -> Tensor:
    """BPDG's gate over blocks of `block_size`."""
    spans = block_spans(mask, block_size=constants.pop("block_size"))
    return span_gates(student, behavior, mask, spans, **constants)


def mean_normalized(weight: Tensor, mask: Tensor) -> Tensor:
    """What a step does to its gradient, done to the weights of one whole batch (BPDG eq. 3)."""
    weight = torch.where(mask, weight, 0.0)
    total = weight.sum()
    return weight * mask.sum() / total if total > 0 else weight
