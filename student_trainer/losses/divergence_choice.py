"""Which divergence a run uses: formula and its constants, as one callable of the loss inputs.

Shape legend: B = sequences, T = response positions, K = teacher support, J = student top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .divergences import (
    check_clip,
    check_clip_log_ratio,
    forward_kl,
    local_support_matching,
    sampled_reverse_kl,
    student_topk_reverse_kl,
    truncated_reverse_kl,
)
from .inputs import LossInputs, need

Divergence = Callable[[LossInputs], Tensor]
"""[B, T], with gradient. The dataclasses below, or any function of this signature."""


@dataclass(frozen=True, kw_only=True)
class SampledReverseKL:
    """The sampled token's policy gradient: `divergences.sampled_reverse_kl`."""

    clip_epsilon: float | None = 0.2
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        check_clip(self.clip_epsilon, self.dual_clip)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return sampled_reverse_kl(
            inputs.student_logprobs_BT,
            inputs.behavior_logprobs_BT,
            inputs.teacher_logprobs_BT,
            clip_epsilon=self.clip_epsilon,
            dual_clip=self.dual_clip,
        )


@dataclass(frozen=True, kw_only=True)
class LocalSupportMatching:
    """KL renormalised on the teacher's top-K: `divergences.local_support_matching`."""

    clip_log_ratio: float | None = None

    def __post_init__(self) -> None:
        check_clip_log_ratio(self.clip_log_ratio)

    def __call__(self, inputs: LossInputs) -> Tensor:
        teacher_BTK = need(inputs.teacher_topk_logprobs_BTK, "teacher_topk_logprobs_BTK")
        student_BTK = need(
            inputs.student_logprobs_at_teacher_topk_BTK, "student_logprobs_at_teacher_topk_BTK"
        )
        return local_support_matching(student_BTK, teacher_BTK, clip_log_ratio=self.clip_log_ratio)


@dataclass(frozen=True, kw_only=True)
class TruncatedReverseKL:
    """`LocalSupportMatching` not renormalised: `divergences.truncated_reverse_kl`."""

    tail: bool

    def __call__(self, inputs: LossInputs) -> Tensor:
        teacher_BTK = need(inputs.teacher_topk_logprobs_BTK, "teacher_topk_logprobs_BTK")
        student_BTK = need(
            inputs.student_logprobs_at_teacher_topk_BTK, "student_logprobs_at_teacher_topk_BTK"
        )
        return truncated_reverse_kl(student_BTK, teacher_BTK, tail=self.tail)


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """KL from the teacher over its top-K and a tail: `divergences.forward_kl`."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        teacher_BTK = need(inputs.teacher_topk_logprobs_BTK, "teacher_topk_logprobs_BTK")
        student_BTK = need(
            inputs.student_logprobs_at_teacher_topk_BTK, "student_logprobs_at_teacher_topk_BTK"
        )
        return forward_kl(student_BTK, teacher_BTK)


@dataclass(frozen=True, kw_only=True)
class StudentTopKReverseKL:
    """The policy gradient over the student's top-J: `divergences.student_topk_reverse_kl`."""

    clip_epsilon: float | None = 0.2
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        check_clip(self.clip_epsilon, self.dual_clip)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return student_topk_reverse_kl(
            need(
                inputs.student_logprobs_at_student_topk_BTJ, "student_logprobs_at_student_topk_BTJ"
            ),
            need(inputs.behavior_topk_logprobs_BTJ, "behavior_topk_logprobs_BTJ"),
            need(
                inputs.teacher_logprobs_at_student_topk_BTJ, "teacher_logprobs_at_student_topk_BTJ"
            ),
            clip_epsilon=self.clip_epsilon,
            dual_clip=self.dual_clip,
        )
