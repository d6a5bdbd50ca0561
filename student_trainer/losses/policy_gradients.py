"""Surrogates whose gradient is that of a divergence: candidates' rewards times policy ratios.

Shape legend: B = sequences, T = response positions, N = candidates of a support. Index t is the
t-th response token; nats. Values are [B, T], with gradient, not masked, not reduced, and no KL:
log `divergences.reverse_kl_monitor` instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.settings import loss as constants

from .checks import check_included, check_log_probs
from .divergences import masked_log_softmax
from .inputs import LossInputs, need
from .supports import reward_support
from .weights import highest_share

MAX_LOG_RATIO = 20.0
"""Policy ratios are taken of log-ratios clamped to +-20 nats, so that exp cannot overflow."""


def _clipped_surrogate(
    student_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantage: Tensor,
    clip_epsilon: float | None,
    dual_clip: float | None,
) -> Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A), and at most -c A where A < 0, in PPO's notation.

    r = p_student / p_behavior, A the advantage, c the dual clip. Homogeneous of degree one in A, so
    multiplying the loss by a weight >= 0 equals multiplying the advantage by it, which is how the
    papers write their weights.
    """
    log_ratio = (student_logprobs - behavior_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    loss = -advantage * ratio
    if clip_epsilon is not None:
        clipped_ratio = ratio.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon)
        loss = torch.maximum(loss, -advantage * clipped_ratio)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
    return loss


def sampled_reverse_kl(
    student_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    teacher_logprobs_BT: Tensor,
    *,
    clip_epsilon: float | None,
    dual_clip: float | None,
    baseline_BT: Tensor | None = None,
) -> Tensor:
    """Surrogate whose gradient is, on policy and in expectation, that of KL(student || teacher).

    KL(student || teacher) = E_{y ~ student}[log p_student(y) - log p_teacher(y)] at one prefix,
    estimated with the sampled token: advantage A = log p_teacher - log p_behavior, constant, times
    the PPO ratio p_student / p_behavior. The value is not a KL; log `reverse_kl_monitor` instead.
    The expectation runs over the sampled token only: what the token does to later prefixes is left
    out on purpose.

    Source: thinkingmachines.ai/blog/on-policy-distillation; as the baseline of arXiv 2603.25562 and
    2606.22600 (eq. 4-6; clip 0.2, dual clip 3.0).

    Args:
        student_logprobs_BT: of the sampled tokens, with gradient.
        behavior_logprobs_BT: of the policy that sampled them, no gradient.
        teacher_logprobs_BT: no gradient.
        clip_epsilon: PPO clip of the ratio, in (0, 1); None leaves the ratio alone.
        dual_clip: bound of the ratio where A < 0, above 1; None leaves it unbounded.
        baseline_BT: taken off A; the same whatever token was sampled, or the estimate is biased
            (`expected_advantages`). No gradient.

    Raises:
        ValueError: shapes differ, a fixed input carries gradient, or half precision.
    """
    check_log_probs(
        2,
        student={"student_logprobs_BT": student_logprobs_BT},
        fixed={
            "behavior_logprobs_BT": behavior_logprobs_BT,
            "teacher_logprobs_BT": teacher_logprobs_BT,
        },
    )
    advantage_BT = teacher_logprobs_BT - behavior_logprobs_BT
    if baseline_BT is not None:
        advantage_BT = advantage_BT - baseline_BT
    return _clipped_surrogate(
        student_logprobs_BT, behavior_logprobs_BT, advantage_BT, clip_epsilon, dual_clip
    )


def expected_advantages(behavior_logprobs_BTN: Tensor, teacher_logprobs_BTN: Tensor) -> Tensor:
    """sum over a list of p_behavior (log p_teacher - log p_behavior), [B, T], constant.

    Over all of V this is E_{y ~ behavior}[A] = -KL(behavior || teacher), the value of a position.
    As a baseline it takes that much variance away; over the top-k of the policy that sampled, which
    stands before the token is drawn, it is an approximation that biases nothing.

    Source: arXiv 2605.07865 (vOPD), whose student and behavior policy are one.
    """
    gap_BTN = teacher_logprobs_BTN - behavior_logprobs_BTN
    return (behavior_logprobs_BTN.exp() * gap_BTN).sum(dim=-1)


class SampledReverseKL(constants.SampledReverseKLSettings):
    """`sampled_reverse_kl` of the sampled token, with the baseline of `expected_advantages` or
    none."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        baseline_BT = None
        if self.baseline == "student_topk":
            listed = reward_support(inputs, "only_stu")
            assert listed.behavior_logprobs_BTN is not None  # reward_support asked for it
            pair = listed.behavior_logprobs_BTN, listed.teacher_logprobs_BTN
            baseline_BT = torch.where(inputs.mask_BT, expected_advantages(*pair), 0.0)
        return sampled_reverse_kl(
            inputs.student_logprobs_BT,
            inputs.behavior_logprobs_BT,
            inputs.teacher_logprobs_BT,
            clip_epsilon=self.clip_epsilon,
            dual_clip=self.dual_clip,
            baseline_BT=baseline_BT,
        )


def candidate_rewards(
    behavior_logprobs_BTN: Tensor,
    teacher_logprobs_BTN: Tensor,
    *,
    included_BTN: Tensor | None,
    weight_mode: constants.WeightMode,
    normalize_weights: bool,
) -> Tensor:
    """-w_v (log p_behavior(v) - log p_teacher(v)), [B, T, N], constant; of no meaning outside S.

    w is p_behavior ("student_p"), p_teacher ("teacher_p") or 1 ("uniform"), divided by its sum over
    S unless normalize_weights is off.
    """
    if weight_mode == "uniform":
        log_weight_BTN = torch.zeros_like(behavior_logprobs_BTN)
    else:
        by_student = weight_mode == "student_p"
        log_weight_BTN = behavior_logprobs_BTN if by_student else teacher_logprobs_BTN
    if normalize_weights:
        log_weight_BTN = masked_log_softmax(log_weight_BTN, included_BTN)
    return log_weight_BTN.exp() * (teacher_logprobs_BTN - behavior_logprobs_BTN)


def support_reverse_kl(
    student_logprobs_BTN: Tensor,
    behavior_logprobs_BTN: Tensor,
    teacher_logprobs_BTN: Tensor,
    *,
    included_BTN: Tensor | None = None,
    weight_mode: constants.WeightMode = "student_p",
    normalize_weights: bool = True,
    clip_epsilon: float | None,
    dual_clip: float | None,
) -> Tensor:
    """Surrogate of KL(student || teacher): policy gradient over the candidates of a support S.

    Every candidate has a constant reward (`candidate_rewards`) and its own PPO ratio; the sum over
    S is returned. KL(student || teacher) = E_{y ~ student}[log p_student(y) - log p_teacher(y)], of
    which, on policy and with "student_p", this is the exact gradient at S = V. On a smaller S the
    rewards do not sum to zero and log p_student is normalised over V, so the gradient also moves
    the total mass of S, mostly down: unlike `local_support_matching`, this is biased (arXiv
    2605.11182). With another weight it is the gradient of no KL. The value is not a KL.

    Source: released code of arXiv 2605.07804 (Prune-OPD) and of thunlp/OPD, whose paper states eq.
    2, sum_t KL(student || teacher): S the student's top 16, "student_p" renormalised on S. The
    other supports and weights are options of that code; its weights on the symmetric difference are
    not renormalised.

    Args:
        student_logprobs_BTN: current student at the candidates, with gradient.
        behavior_logprobs_BTN: before the first update, no gradient.
        teacher_logprobs_BTN: no gradient.
        included_BTN: the candidates in S; None for all.
        weight_mode, normalize_weights: as in `candidate_rewards`.
        clip_epsilon, dual_clip: as in `sampled_reverse_kl`.

    Raises:
        ValueError: as in `sampled_reverse_kl`, or N is 0.
    """
    student, behavior, teacher = student_logprobs_BTN, behavior_logprobs_BTN, teacher_logprobs_BTN
    fixed = {"behavior_logprobs_BTN": behavior, "teacher_logprobs_BTN": teacher}
    check_log_probs(3, student={"student_logprobs_BTN": student}, fixed=fixed)
    check_included(included_BTN, student)
    reward_BTN = candidate_rewards(
        behavior,
        teacher,
        included_BTN=included_BTN,
        weight_mode=weight_mode,
        normalize_weights=normalize_weights,
    )
    surrogate_BTN = _clipped_surrogate(student, behavior, reward_BTN, clip_epsilon, dual_clip)
    if included_BTN is not None:
        surrogate_BTN = surrogate_BTN.masked_fill(~included_BTN, 0.0)
    return surrogate_BTN.sum(dim=-1)


class StudentTopKReverseKL(constants.StudentTopKReverseKLSettings):
    """`support_reverse_kl`; on "symmetric_difference" not renormalised, as in the released code."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        support = reward_support(inputs, self.support)
        assert support.behavior_logprobs_BTN is not None  # reward_support asked for it
        return support_reverse_kl(
            support.student_logprobs_BTN,
            support.behavior_logprobs_BTN,
            support.teacher_logprobs_BTN,
            included_BTN=support.included_BTN,
            weight_mode=self.weight_mode,
            normalize_weights=self.support != "symmetric_difference",
            clip_epsilon=self.clip_epsilon,
            dual_clip=self.dual_clip,
        )


class ResidualReverseKL(constants.ResidualReverseKLSettings):
    """Every token of the student's top-k with its probability, and the sampled one where it is
    another: on policy and in expectation the gradient of the whole KL(student || teacher).

    sum over S of p_behavior(v) times the surrogate of v, plus 1[y not in S] times that of y. A
    token outside S is drawn with its own probability, so that those terms add up to the rest of the
    sum over V, of which local support matching and `support_reverse_kl` see nothing. Lower
    variance than the sampled token alone: most of the mass is summed, not drawn.

    Source: arXiv 2610.04882 (ResOPD) by its description: unbiased for the full reverse KL from the
    top-k, the sampled token and the event that it is outside. Clips are as in `sampled_reverse_kl`
    and ours there.
    """

    def __call__(self, inputs: LossInputs) -> Tensor:
        listed = reward_support(inputs, "only_stu")
        assert listed.behavior_logprobs_BTN is not None  # reward_support asked for it
        summed_BT = support_reverse_kl(
            listed.student_logprobs_BTN,
            listed.behavior_logprobs_BTN,
            listed.teacher_logprobs_BTN,
            normalize_weights=False,
            clip_epsilon=self.clip_epsilon,
            dual_clip=self.dual_clip,
        )
        drawn_BT = sampled_reverse_kl(
            inputs.student_logprobs_BT,
            inputs.behavior_logprobs_BT,
            inputs.teacher_logprobs_BT,
            clip_epsilon=self.clip_epsilon,
            dual_clip=self.dual_clip,
        )
        name = "sampled.in_student_topk_BTN"
        inside_BT = need(inputs.sampled.in_student_topk_BTN, name).squeeze(-1)
        return torch.where(inputs.mask_BT, summed_BT + drawn_BT.masked_fill(inside_BT, 0.0), 0.0)


class SuppressUnlikely(constants.SuppressUnlikelySettings):
    """A constant negative advantage on the max(1, floor(share n)) of a response's n tokens that the
    behavior policy found least likely, and on those as unlikely as the last of them.

    Nothing of the teacher's enters: a control, by which what a teacher adds can be told from what
    comes of suppressing unlikely tokens. Source: arXiv 2608.31046 (OPSA), where it matches
    distillation; its adaptation to the entropy is not here.
    """

    def __call__(self, inputs: LossInputs) -> Tensor:
        behavior_BT, mask_BT = inputs.behavior_logprobs_BT, inputs.mask_BT
        lowest_BT = highest_share(-behavior_BT, mask_BT, ratio=self.share)
        advantage_BT = torch.where(lowest_BT, self.advantage, 0.0).to(behavior_BT.dtype)
        return _clipped_surrogate(
            inputs.student_logprobs_BT, behavior_BT, advantage_BT, self.clip_epsilon, self.dual_clip
        )


KINDS = (SampledReverseKL, StudentTopKReverseKL, ResidualReverseKL, SuppressUnlikely)
