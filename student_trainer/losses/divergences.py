"""Per-token divergences of student and teacher: [B, T], with gradient, not masked, not reduced.

Shape legend for this package:
  B = sequences, T = response positions, K = teacher support, J = student top-k, V = vocabulary,
  N = candidates of a support (`supports`): K, or more where lists stand side by side.
Alignment: index t is the t-th response token; every log-prob is log p(token_t | prompt, tokens <
t), in nats. Masked positions hold 0.0 and never reach a sum.

`included_BTN` is True for the candidates that belong to the support S; the others enter no sum, no
normalisation and no gradient, and a position with none costs 0. None includes all.

A class is a formula with its constants, whose ranges are checked where they are stated,
`settings.loss`. Nothing here knows which tokens count, what a token is worth or how many there are:
`weights` says the second, `objective` the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_trainer.settings import loss as constants

from .checks import check_included, check_log_probs
from .inputs import LossInputs, need
from .supports import matching_support, teacher_topk


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


def masked_log_softmax(logprobs_BTN: Tensor, included_BTN: Tensor | None) -> Tensor:
    """Log-probs renormalised over the included candidates, -inf at the others.

    A position without any is renormalised over all, so that no NaN arises; the caller drops it.
    """
    if included_BTN is None:
        return logprobs_BTN.log_softmax(dim=-1)
    kept_BTN = included_BTN | ~included_BTN.any(dim=-1, keepdim=True)
    return logprobs_BTN.masked_fill(~kept_BTN, -math.inf).log_softmax(dim=-1)


def _log_ratio(student_BTN: Tensor, teacher_BTN: Tensor, included_BTN: Tensor | None) -> Tensor:
    """log p_student - log p_teacher, 0.0 and without gradient where a candidate is excluded."""
    log_ratio_BTN = student_BTN - teacher_BTN
    if included_BTN is None:
        return log_ratio_BTN
    return log_ratio_BTN.masked_fill(~included_BTN, 0.0)


def check_pair(
    student_logprobs_BTN: Tensor, teacher_logprobs_BTN: Tensor, included_BTN: Tensor | None = None
) -> None:
    check_log_probs(
        3,
        student={"student_logprobs_BTN": student_logprobs_BTN},
        fixed={"teacher_logprobs_BTN": teacher_logprobs_BTN},
    )
    check_included(included_BTN, student_logprobs_BTN)


def local_support_matching(
    student_logprobs_BTN: Tensor,
    teacher_logprobs_BTN: Tensor,
    *,
    included_BTN: Tensor | None = None,
    clip_log_ratio: float | None = None,
) -> Tensor:
    """KL(student || teacher) on a support S, both renormalised on S; >= 0.

    E_{v ~ student | S}[log p_student(v | S) - log p_teacher(v | S)], exact over S, differentiated
    through the student. The gradient with respect to a student logit is p(v|S) (log-ratio_v - KL)
    inside S and zero outside: it cannot move mass into S, so watch the student's mass there. S = V
    is the exact KL. Logits serve as well as log-probs, since a constant per position cancels.

    Source: arXiv 2603.25562, eq. 6-8, where S is the teacher's top-K; `clip_log_ratio` clamps the
    log-ratio to +-that many nats as in the released code (5 there, off by default), after which the
    value may be negative.

    Args:
        student_logprobs_BTN: at the candidates, with gradient.
        teacher_logprobs_BTN: at the candidates, no gradient.
        included_BTN: the candidates in S; None for all.
        clip_log_ratio: nats, or None.

    Raises:
        ValueError: shapes differ, the teacher carries gradient, N is 0, half precision.
    """
    check_pair(student_logprobs_BTN, teacher_logprobs_BTN, included_BTN)
    student_BTN = masked_log_softmax(student_logprobs_BTN, included_BTN)
    teacher_BTN = masked_log_softmax(teacher_logprobs_BTN, included_BTN)
    log_ratio_BTN = _log_ratio(student_BTN, teacher_BTN, included_BTN)
    if clip_log_ratio is not None:
        log_ratio_BTN = log_ratio_BTN.clamp(-clip_log_ratio, clip_log_ratio)
    return (student_BTN.exp() * log_ratio_BTN).sum(dim=-1)


def mass_outside(inputs: LossInputs, tail: bool) -> Tensor | None:
    """The log of the student's, for a loss with a tail. Raises ValueError where it is not there."""
    return need(inputs.student_log_outside_BT, "student_log_outside_BT") if tail else None


def at_teacher_topk(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Log-probs of student and teacher at the teacher's K ids, [B, T, K] each."""
    top = teacher_topk(inputs)
    return top.student_logprobs_BTN, top.teacher_logprobs_BTN


def _log_outside(logprobs_BTN: Tensor, included_BTN: Tensor | None = None) -> Tensor:
    """[B, T]: the log of 1 less the mass of the support, at least 1e-7: all that its log-probs
    say, and what there is of the teacher's."""
    if included_BTN is not None:
        logprobs_BTN = logprobs_BTN.masked_fill(~included_BTN, -math.inf)
    log_mass_BT = logprobs_BTN.logsumexp(dim=-1).clamp(max=-1e-7)
    return torch.log(-torch.expm1(log_mass_BT))


def with_tail(
    student_BTN: Tensor,
    teacher_BTN: Tensor,
    included_BTN: Tensor | None = None,
    student_log_outside_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of both, [B, T, N + 1] each, everything outside the support as one more class.

    The teacher's mass outside is 1 less that of its list, at least 1e-7: what travels of it. The
    student's is the head's own sum over the rest (`learner.head_logprobs`), right to 1e-5 of itself
    however small; without it, 1 less its list, which in float32 is wrong below 1e-5 and has no
    gradient below 1e-7: where the student is sure, and possibly of the wrong token. Where there is
    nothing outside the support, the class has no part in any divergence.
    """
    teacher_BT = _log_outside(teacher_BTN, included_BTN)
    if student_log_outside_BT is None:
        student_BT = _log_outside(student_BTN, included_BTN)
    else:
        is_there_BT = ~student_log_outside_BT.isneginf()
        student_BT = torch.where(is_there_BT, student_log_outside_BT, teacher_BT)
    return (
        torch.cat([student_BTN, student_BT.unsqueeze(-1)], dim=-1),
        torch.cat([teacher_BTN, teacher_BT.unsqueeze(-1)], dim=-1),
    )


def truncated_reverse_kl(
    student_logprobs_BTN: Tensor,
    teacher_logprobs_BTN: Tensor,
    *,
    tail: bool,
    included_BTN: Tensor | None = None,
    student_log_outside_BT: Tensor | None = None,
) -> Tensor:
    """The terms of KL(student || teacher) on a support S, not renormalised; with a tail, a KL.

    tail=False: sum over S of p_student (log p_student - log p_teacher). **Not a divergence:
    negative values are normal**, and emptying S lowers it; arXiv 2603.25562 reports collapse
    without renormalisation. tail=True adds everything outside S as one more class, which makes it a
    KL of one class more than S has tokens, E_{c ~ student}[log p_student(c) - log p_teacher(c)]:
    between 0 and the exact KL, and it does move mass into S (TRL's `loss_add_tail`). Both equal the
    exact KL at S = V. Unlike in `local_support_matching`, logits do not serve here.

    On the tail class the reverse KL divides by the teacher's mass outside its list. Of a teacher
    that is sure, and whose log-probs travel in 16 bits, that is right to 2e-4 of all mass only: a
    token on which it keeps less than that outside may cost up to log(2.6) nats too much or little.

    Args and errors as in `local_support_matching`; `student_log_outside_BT` as in `with_tail`.
    """
    check_pair(student_logprobs_BTN, teacher_logprobs_BTN, included_BTN)
    student, teacher = student_logprobs_BTN, teacher_logprobs_BTN
    if tail:
        student, teacher = with_tail(student, teacher, included_BTN, student_log_outside_BT)
        if included_BTN is not None:
            included_BTN = torch.nn.functional.pad(included_BTN, (0, 1), value=True)
    return (student.exp() * _log_ratio(student, teacher, included_BTN)).sum(dim=-1)


class LocalSupportMatching(constants.LocalSupportMatchingSettings):
    """`local_support_matching` on a support, or `truncated_reverse_kl` with a tail."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        support = matching_support(inputs, self.support)
        pair = support.student_logprobs_BTN, support.teacher_logprobs_BTN
        included_BTN = support.included_BTN
        if self.tail:
            loss_BT = truncated_reverse_kl(
                *pair,
                tail=True,
                included_BTN=included_BTN,
                student_log_outside_BT=mass_outside(inputs, self.tail),
            )
            return torch.where(inputs.mask_BT, loss_BT, 0.0)
        return local_support_matching(
            *pair, included_BTN=included_BTN, clip_log_ratio=self.clip_log_ratio
        )


class TruncatedReverseKL(constants.TruncatedReverseKLSettings):
    """`truncated_reverse_kl` on the teacher's top-K."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        loss_BT = truncated_reverse_kl(
            *at_teacher_topk(inputs),
            tail=self.tail,
            student_log_outside_BT=mass_outside(inputs, self.tail),
        )
        return torch.where(inputs.mask_BT, loss_BT, 0.0)


def forward_kl(
    student_logprobs_BTK: Tensor,
    teacher_logprobs_BTK: Tensor,
    *,
    tail: bool = True,
    student_log_outside_BT: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) over the teacher's top-K support S; >= 0.

    tail=True: E_{c ~ teacher}[log p_teacher(c) - log p_student(c)] over K + 1 classes, the tokens
    of S and everything else as one: between 0 and the exact KL. Its gradient with respect to a
    student logit is p_student - p_teacher inside S, so that, unlike any reverse KL, it does not
    vanish where the student is sure of a token that the teacher rules out: there the reverse KL's
    gradient is proportional to the student's mass on the right token.
    tail=False: E_{v ~ teacher | S}[log p_teacher(v | S) - log p_student(v)], the teacher
    renormalised on S against the student over the whole vocabulary. It is 0 only where the student
    has no mass outside S, so it also drives that mass out.
    Both equal the exact KL at K = V.

    Source: not of the four papers; generalised knowledge distillation (arXiv 2306.13649) on the
    student's own prefixes, with the tail bucket of TRL's `loss_add_tail`; without the tail, the
    forward term of arXiv 2603.07079.

    Args and errors as in `local_support_matching`, except that logits do not serve;
    `student_log_outside_BT` as in `with_tail`.
    """
    check_pair(student_logprobs_BTK, teacher_logprobs_BTK)
    if tail:
        student, teacher = with_tail(
            student_logprobs_BTK,
            teacher_logprobs_BTK,
            student_log_outside_BT=student_log_outside_BT,
        )
    else:
        student, teacher = student_logprobs_BTK, teacher_logprobs_BTK.log_softmax(dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


class ForwardKL(constants.ForwardKLSettings):
    """`forward_kl` over the teacher's top-K."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        loss_BT = forward_kl(
            *at_teacher_topk(inputs),
            tail=self.tail,
            student_log_outside_BT=mass_outside(inputs, self.tail),
        )
        # Renormalised, a teacher of zeros is uniform and a student of zeros is not.
        return torch.where(inputs.mask_BT, loss_BT, 0.0)


def generalized_jsd(
    student_logprobs_BTK: Tensor,
    teacher_logprobs_BTK: Tensor,
    *,
    beta: float,
    student_log_outside_BT: Tensor | None = None,
) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    KL(teacher || m) = E_{c ~ teacher}[log p_teacher(c) - log m(c)], KL(student || m) =
    E_{c ~ student}[log p_student(c) - log m(c)], over K + 1 classes: the teacher's top-K and
    everything else. In [0, H(beta)], H the entropy of a coin of bias beta: at most log 2 nats, so a
    hopeless token cannot dominate a step. Equal to the exact divergence at K = V. beta = 1/2 is the
    Jensen-Shannon divergence. The limits are reached after dividing: JSD / beta tends to the
    forward KL(teacher || student) as beta -> 0, JSD / (1 - beta) to the reverse KL(student ||
    teacher) as beta -> 1. The value is not divided here, so a small beta is a small learning rate.

    Source: arXiv 2306.13649 (GKD), eq. 1, and TRL's `beta`. Departures: top-K and tail instead of
    the whole vocabulary; beta of exactly 0 or 1 is refused, `forward_kl` and
    `truncated_reverse_kl(tail=True)` are those.

    Args and errors as in `forward_kl`.
    """
    check_pair(student_logprobs_BTK, teacher_logprobs_BTK)
    student, teacher = with_tail(
        student_logprobs_BTK, teacher_logprobs_BTK, student_log_outside_BT=student_log_outside_BT
    )
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    from_teacher_BT = (teacher.exp() * (teacher - mixture)).sum(dim=-1)
    from_student_BT = (student.exp() * (student - mixture)).sum(dim=-1)
    return beta * from_teacher_BT + (1.0 - beta) * from_student_BT


class GeneralizedJSD(constants.GeneralizedJSDSettings):
    """`generalized_jsd` over the teacher's top-K and a tail."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        loss_BT = generalized_jsd(
            *at_teacher_topk(inputs),
            beta=self.beta,
            student_log_outside_BT=mass_outside(inputs, True),
        )
        return torch.where(inputs.mask_BT, loss_BT, 0.0)


KINDS = (LocalSupportMatching, TruncatedReverseKL, ForwardKL, GeneralizedJSD)
