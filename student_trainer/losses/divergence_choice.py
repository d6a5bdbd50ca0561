"""Which divergence a run uses: formula and its constants, as one callable of the loss inputs.

Shape legend: B = sequences, T = response positions, K = teacher support, N = candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from .divergences import (
    check_choice,
    check_clip_log_ratio,
    check_entropy_threshold,
    check_fraction_open,
    entropy_aware_kl,
    forward_kl,
    generalized_jsd,
    local_support_matching,
    truncated_reverse_kl,
)
from .inputs import LossInputs, need
from .policy_gradients import (
    WeightMode,
    check_clip,
    sampled_reverse_kl,
    support_reverse_kl,
)
from .supports import (
    MATCHING_SUPPORTS,
    REWARD_SUPPORTS,
    MatchingSupport,
    RewardSupport,
)

Divergence = Callable[[LossInputs], Tensor]
"""[B, T], with gradient. The dataclasses below, or any function of this signature."""

_TEACHER_TOPK = MATCHING_SUPPORTS["teacher_topk"]


@dataclass(frozen=True, kw_only=True)
class SampledReverseKL:
    """The sampled token's policy gradient: `policy_gradients.sampled_reverse_kl`."""

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
    """KL renormalised on a support, or with a tail class: `divergences.local_support_matching`.

    The supports are V1-V3 of arXiv 2603.25562, G.3. With `tail`, everything outside the support is
    one more class and nothing is renormalised: `divergences.truncated_reverse_kl`.
    """

    support: MatchingSupport = "teacher_topk"
    tail: bool = False
    clip_log_ratio: float | None = None

    def __post_init__(self) -> None:
        check_choice("support", self.support, get_args(MatchingSupport))
        check_clip_log_ratio(self.clip_log_ratio)
        if self.tail and self.clip_log_ratio is not None:
            raise ValueError("clip_log_ratio is of the renormalised form, which has no tail")

    def __call__(self, inputs: LossInputs) -> Tensor:
        support = MATCHING_SUPPORTS[self.support]
        student_BTN, teacher_BTN = support.student(inputs), support.teacher(inputs)
        included_BTN = support.included(inputs)
        if self.tail:
            return truncated_reverse_kl(
                student_BTN, teacher_BTN, tail=True, included_BTN=included_BTN
            )
        return local_support_matching(
            student_BTN,
            teacher_BTN,
            included_BTN=included_BTN,
            clip_log_ratio=self.clip_log_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class TruncatedReverseKL:
    """Teacher's top-K, not renormalised: `divergences.truncated_reverse_kl`."""

    tail: bool

    def __call__(self, inputs: LossInputs) -> Tensor:
        student_BTK, teacher_BTK = _TEACHER_TOPK.student(inputs), _TEACHER_TOPK.teacher(inputs)
        return truncated_reverse_kl(student_BTK, teacher_BTK, tail=self.tail)


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """KL from the teacher over its top-K, with or without a tail: `divergences.forward_kl`."""

    tail: bool = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        student_BTK, teacher_BTK = _TEACHER_TOPK.student(inputs), _TEACHER_TOPK.teacher(inputs)
        return forward_kl(student_BTK, teacher_BTK, tail=self.tail)


@dataclass(frozen=True, kw_only=True)
class GeneralizedJSD:
    """GKD's divergence over the teacher's top-K and a tail: `divergences.generalized_jsd`."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        check_fraction_open("beta", self.beta)

    def __call__(self, inputs: LossInputs) -> Tensor:
        student_BTK, teacher_BTK = _TEACHER_TOPK.student(inputs), _TEACHER_TOPK.teacher(inputs)
        return generalized_jsd(student_BTK, teacher_BTK, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class EntropyAwareKL:
    """Reverse KL, and forward where the teacher is unsure: `divergences.entropy_aware_kl`."""

    entropy_threshold: float = 0.8
    tail: bool = False

    def __post_init__(self) -> None:
        check_entropy_threshold(self.entropy_threshold)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return entropy_aware_kl(
            _TEACHER_TOPK.student(inputs),
            _TEACHER_TOPK.teacher(inputs),
            need(inputs.teacher_entropies_BT, "teacher_entropies_BT"),
            entropy_threshold=self.entropy_threshold,
            tail=self.tail,
        )


@dataclass(frozen=True, kw_only=True)
class StudentTopKReverseKL:
    """Prune-OPD's policy gradient over candidates: `policy_gradients.support_reverse_kl`.

    The weights of "symmetric_difference" are not renormalised, as in the released code.
    """

    support: RewardSupport = "only_stu"
    weight_mode: WeightMode = "student_p"
    clip_epsilon: float | None = 0.2
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        check_choice("support", self.support, get_args(RewardSupport))
        check_choice("weight_mode", self.weight_mode, get_args(WeightMode))
        check_clip(self.clip_epsilon, self.dual_clip)

    def __call__(self, inputs: LossInputs) -> Tensor:
        support = REWARD_SUPPORTS[self.support]
        return support_reverse_kl(
            support.student(inputs),
            support.behavior(inputs),
            support.teacher(inputs),
            included_BTN=support.included(inputs),
            weight_mode=self.weight_mode,
            normalize_weights=self.support != "symmetric_difference",
            clip_epsilon=self.clip_epsilon,
            dual_clip=self.dual_clip,
        )
