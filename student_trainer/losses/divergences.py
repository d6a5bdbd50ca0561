"""Per-token divergences of student and teacher: [B, T], with gradient, not masked, not reduced.

Shape legend for this package:
  B = sequences, T = response positions, K = teacher support, J = student top-k, V = vocabulary.
Alignment: index t is the t-th response token; every log-prob is log p(token_t | prompt, tokens <
t), in nats. Masked positions hold 0.0 and never reach a sum.

Nothing here knows which tokens count, what a token is worth or how many there are: `weights` says
the second, `objective` the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Policy ratios are taken of log-ratios clamped to +-20 nats, so that exp cannot overflow."""


def check_log_probs(
    ndim: int, *, student: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless all share one shape of `ndim` axes and `fixed` carries no gradient.

    Half precision is refused: rounding a log-prob of -10 to bfloat16 moves it by up to 0.03 nats.
    """
    reference, *_ = {**student, **fixed}.items()
    for name, tensor in {**student, **fixed}.items():
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(tensor.shape)}")
        if tensor.shape != reference[1].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, "
                f"{reference[0]} has shape {tuple(reference[1].shape)}"
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
        if ndim == 3 and tensor.shape[-1] == 0:
            raise ValueError(f"{name} has an empty support, shape {tuple(tensor.shape)}")
    for name, tensor in fixed.items():
        if tensor.requires_grad:
            raise ValueError(f"{name} must not carry gradient; detach it")


def check_clip(clip_epsilon: float | None, dual_clip: float | None) -> None:
    """Raise ValueError unless 0 < clip_epsilon < 1 and dual_clip > 1, each where given."""
    if clip_epsilon is not None and not 0.0 < clip_epsilon < 1.0:
        raise ValueError(f"clip_epsilon must be in (0, 1), got {clip_epsilon}")
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")


def check_clip_log_ratio(clip_log_ratio: float | None) -> None:
    """Raise ValueError unless clip_log_ratio is positive, where given."""
    if clip_log_ratio is not None and not clip_log_ratio > 0.0:
        raise ValueError(f"clip_log_ratio must be positive, got {clip_log_ratio}")


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

    Raises:
        ValueError: shapes differ, a fixed input carries gradient, half precision, or a clip out of
        range.
    """
    check_clip(clip_epsilon, dual_clip)
    check_log_probs(
        2,
        student={"student_logprobs_BT": student_logprobs_BT},
        fixed={
            "behavior_logprobs_BT": behavior_logprobs_BT,
            "teacher_logprobs_BT": teacher_logprobs_BT,
        },
    )
    advantage_BT = teacher_logprobs_BT - behavior_logprobs_BT
    return _clipped_surrogate(
        student_logprobs_BT, behavior_logprobs_BT, advantage_BT, clip_epsilon, dual_clip
    )


def reverse_kl_monitor(behavior_logprobs_BT: Tensor, teacher_logprobs_BT: Tensor) -> Tensor:
    """The value to log: log p_behavior - log p_teacher of the sampled token, [B, T], no gradient.

    Its mean over tokens sampled from the behaviour policy is an unbiased estimate of KL(behavior ||
    teacher) = E_{y ~ behavior}[log p_behavior(y) - log p_teacher(y)]. Single tokens may be
    negative.
    """
    check_log_probs(
        2,
        student={},
        fixed={
            "behavior_logprobs_BT": behavior_logprobs_BT,
            "teacher_logprobs_BT": teacher_logprobs_BT,
        },
    )
    return behavior_logprobs_BT - teacher_logprobs_BT


def local_support_matching(
    student_logprobs_at_teacher_topk_BTK: Tensor,
    teacher_topk_logprobs_BTK: Tensor,
    *,
    clip_log_ratio: float | None = None,
) -> Tensor:
    """KL(student || teacher) on the teacher's top-K support S, both renormalised on S; >= 0.

    E_{v ~ student | S}[log p_student(v | S) - log p_teacher(v | S)], exact over S, differentiated
    through the student. The gradient with respect to a student logit is p(v|S) (log-ratio_v - KL)
    inside S and zero outside: it cannot move mass into S, so watch the student's mass there. K = V
    is the exact KL. Logits serve as well as log-probs, since a constant per position cancels.

    Source: arXiv 2603.25562, eq. 6-8; `clip_log_ratio` clamps the log-ratio to +-that many nats as
    in the released code (5 there, off by default), after which the value may be negative.

    Args:
        student_logprobs_at_teacher_topk_BTK: at the teacher's ids, with gradient.
        teacher_topk_logprobs_BTK: no gradient.
        clip_log_ratio: nats, or None.

    Raises:
        ValueError: shapes differ, the teacher carries gradient, K is 0, half precision, clip not
        positive.
    """
    check_clip_log_ratio(clip_log_ratio)
    check_log_probs(
        3,
        student={"student_logprobs_at_teacher_topk_BTK": student_logprobs_at_teacher_topk_BTK},
        fixed={"teacher_topk_logprobs_BTK": teacher_topk_logprobs_BTK},
    )
    student_BTK = student_logprobs_at_teacher_topk_BTK.log_softmax(dim=-1)
    log_ratio_BTK = student_BTK - teacher_topk_logprobs_BTK.log_softmax(dim=-1)
    if clip_log_ratio is not None:
        log_ratio_BTK = log_ratio_BTK.clamp(-clip_log_ratio, clip_log_ratio)
    return (student_BTK.exp() * log_ratio_BTK).sum(dim=-1)


def _with_tail(logprobs_BTK: Tensor) -> Tensor:
    """[B, T, K + 1]: the log of the mass outside the support appended, of at least 1e-7."""
    log_mass_BT1 = logprobs_BTK.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs_BTK, torch.log(-torch.expm1(log_mass_BT1))], dim=-1)


def truncated_reverse_kl(
    student_logprobs_at_teacher_topk_BTK: Tensor,
    teacher_topk_logprobs_BTK: Tensor,
    *,
    tail: bool,
) -> Tensor:
    """The terms of KL(student || teacher) on the teacher's support, not renormalised: an ablation.

    tail=False: sum over S of p_student (log p_student - log p_teacher). **Not a divergence:
    negative values are normal**, and emptying S lowers it; arXiv 2603.25562 reports collapse
    without renormalisation. tail=True adds everything outside S as one more class, which makes it a
    KL of K + 1 classes: between 0 and the exact KL, and it does move mass into S (TRL's
    `loss_add_tail`). Both equal the exact KL at K = V. Unlike in `local_support_matching`, logits
    do not serve here.

    Args and errors as in `local_support_matching`.
    """
    check_log_probs(
        3,
        student={"student_logprobs_at_teacher_topk_BTK": student_logprobs_at_teacher_topk_BTK},
        fixed={"teacher_topk_logprobs_BTK": teacher_topk_logprobs_BTK},
    )
    student, teacher = student_logprobs_at_teacher_topk_BTK, teacher_topk_logprobs_BTK
    if tail:
        student, teacher = _with_tail(student), _with_tail(teacher)
    return (student.exp() * (student - teacher)).sum(dim=-1)


def forward_kl(
    student_logprobs_at_teacher_topk_BTK: Tensor,
    teacher_topk_logprobs_BTK: Tensor,
) -> Tensor:
    """KL(teacher || student) over the teacher's top-K and one class for everything else; >= 0.

    E_{v ~ teacher}[log p_teacher(v) - log p_student(v)], with the mass outside the support as class
    K + 1: between 0 and the exact KL, and equal to it at K = V. Its gradient with respect to a
    student logit is p_student - p_teacher inside S, so that, unlike any reverse KL, it does not
    vanish where the student is sure of a token that the teacher rules out: there the reverse KL's
    gradient is proportional to the student's mass on the right token.

    Source: not of the four papers; generalised knowledge distillation (arXiv 2306.13649) on the
    student's own prefixes, with the tail bucket of TRL's `loss_add_tail`.

    Args and errors as in `local_support_matching`, except that logits do not serve.
    """
    check_log_probs(
        3,
        student={"student_logprobs_at_teacher_topk_BTK": student_logprobs_at_teacher_topk_BTK},
        fixed={"teacher_topk_logprobs_BTK": teacher_topk_logprobs_BTK},
    )
    student = _with_tail(student_logprobs_at_teacher_topk_BTK)
    teacher = _with_tail(teacher_topk_logprobs_BTK)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def student_topk_reverse_kl(
    student_logprobs_at_student_topk_BTJ: Tensor,
    behavior_topk_logprobs_BTJ: Tensor,
    teacher_logprobs_at_student_topk_BTJ: Tensor,
    *,
    clip_epsilon: float | None,
    dual_clip: float | None,
) -> Tensor:
    """Surrogate of KL(student || teacher): policy gradient over the behaviour policy's top J.

    Candidate j has the constant reward -w_j (log p_behavior(j) - log p_teacher(j)), w the behaviour
    probabilities renormalised over the J candidates, and its own PPO ratio; the sum over j is
    returned. KL(student || teacher) = E_{y ~ student}[log p_student(y) - log p_teacher(y)], of
    which, on policy, this is the exact gradient at J = V. At J < V the rewards do not sum to zero
    and log p_student is normalised over V, so the gradient also moves the total mass of the
    candidates, mostly down: unlike `local_support_matching`, this is biased (arXiv 2605.11182).

    Source: released code of arXiv 2605.07804 (Prune-OPD) and of thunlp/OPD, whose paper states eq.
    2, sum_t KL(student || teacher). The value is not a KL.

    Args:
        student_logprobs_at_student_topk_BTJ: current student at the candidate ids, with gradient.
        behavior_topk_logprobs_BTJ: the candidates' log-probs when they were chosen, no gradient.
        teacher_logprobs_at_student_topk_BTJ: no gradient.
        clip_epsilon, dual_clip: as in `sampled_reverse_kl`.

    Raises:
        ValueError: as in `sampled_reverse_kl`, or J is 0.
    """
    check_clip(clip_epsilon, dual_clip)
    check_log_probs(
        3,
        student={"student_logprobs_at_student_topk_BTJ": student_logprobs_at_student_topk_BTJ},
        fixed={
            "behavior_topk_logprobs_BTJ": behavior_topk_logprobs_BTJ,
            "teacher_logprobs_at_student_topk_BTJ": teacher_logprobs_at_student_topk_BTJ,
        },
    )
    share_BTJ = behavior_topk_logprobs_BTJ.softmax(dim=-1)
    reward_BTJ = share_BTJ * (teacher_logprobs_at_student_topk_BTJ - behavior_topk_logprobs_BTJ)
    surrogate_BTJ = _clipped_surrogate(
        student_logprobs_at_student_topk_BTJ,
        behavior_topk_logprobs_BTJ,
        reward_BTJ,
        clip_epsilon,
        dual_clip,
    )
    return surrogate_BTJ.sum(dim=-1)
