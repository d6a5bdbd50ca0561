"""Our losses obey the laws of every loss, and a loss that breaks one is told which."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from student_trainer.losses import LossInputs, Needs, loss
from student_trainer.losses.entropy_aware import EntropyAwareKL
from student_trainer.losses.laws import LawBrokenError, check_laws
from student_trainer.losses.policy_gradients import SuppressUnlikely
from tests.trainer.losses.loss_cases import DIVERGENCES, POLICY_GRADIENTS

torch.set_num_threads(1)

SURROGATES = {"truncated", "matching_clipped", *POLICY_GRADIENTS}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_loss_obeys_the_laws_with_no_more_than_it_says_it_needs(name: str) -> None:
    tried = DIVERGENCES[name]
    kind = "surrogate" if name in SURROGATES else "divergence"
    check_laws(tried, kind=kind, needs=tried.needs)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_the_control_without_a_teacher_obeys_the_laws(share: float) -> None:
    tried = SuppressUnlikely(share=share)
    assert tried.needs.teacher_k == 0
    check_laws(tried, kind="surrogate", needs=tried.needs)


def test_forward_terms_are_nil_outside_the_mask_from_any_threshold_on() -> None:
    tried = EntropyAwareKL(entropy_threshold=0.0)
    check_laws(tried, kind="divergence", needs=tried.needs)


def gap(inputs: LossInputs) -> Tensor:
    """A divergence of the sampled token alone: half of the squared log-ratio."""
    return 0.5 * (inputs.student_logprobs_BT - inputs.teacher_logprobs_BT).square()


def overwriting(inputs: LossInputs) -> Tensor:
    found = gap(inputs)
    inputs.sampled.teacher_logprobs_BTN.clamp_(min=-1.0)
    return found


OTHER = torch.ones((), dtype=torch.float64, requires_grad=True)

BREAKING = {
    "sum": (lambda i: gap(i).sum(), r"one number a position: torch.float64 of shape \(\) for a"),
    "wide": (lambda i: gap(i)[..., None], r"one number a position: .* of shape \(1, 1, 1\)"),
    "whole numbers": (lambda i: gap(i).long(), "one number a position: torch.int64"),
    "number": (lambda i: 1.0, "one number a position: it returned a float"),
    "error": (lambda i: i.teacher_topk.student_logprobs_BTN, "it raised AttributeError: .*is None"),
    "overwriting": (overwriting, r"inputs left alone: sampled\.teacher_logprobs_BTN was written"),
    "nan": (lambda i: gap(i) * math.nan, "finite: the loss is nan at 1 of 1 positions"),
    "unbounded ratio": (
        lambda i: (i.student_logprobs_BT - i.behavior_logprobs_BT).exp() * gap(i),
        r"finite: the loss is (inf|nan) at \d+ of \d+ positions, with log-probs of -10000",
    ),
    "log of a probability": (
        lambda i: -i.student_logprobs_BT.exp().log(),
        "finite: the loss is inf .* with log-probs of -10000",
    ),
    "infinite gradient": (
        lambda i: gap(i).sqrt(),
        r"finite: the gradient is nan at \d+ of \d+ positions",
    ),
    "outside": (lambda i: gap(i) + 1.0, r"nil outside the mask: 1 at a masked position; torch\."),
    "mean over all positions": (
        lambda i: torch.where(
            i.mask_BT, gap(i) + i.student_logprobs_BT.mean(-1, keepdim=True).square(), 0.0
        ),
        r"nil outside the mask: \d+\.\d+ together, \d+\.\d+ without its masked positions",
    ),
    "mean over the batch": (
        lambda i: gap(i) / i.mask_BT.sum().clamp(min=1),
        r"the same sum when the batch is split: \d+\.\d+ together, \d+\.\d+ by sequences",
    ),
    "random": (
        lambda i: gap(i) * (1 + torch.rand(())),
        r"the same sum when the batch is split: .* by sequences",
    ),
    "detached": (lambda i: gap(i).detach(), "gradient to the student: the loss has none"),
    "parameter": (lambda i: gap(i) * OTHER, r"gradient to the student only: .*a tensor of \(\)"),
    "parameter alone": (
        lambda i: i.mask_BT * OTHER,
        r"gradient to the student only: it also has one to a tensor of \(\)",
    ),
    "flat": (
        lambda i: 0.0 * gap(i),
        "gradient to the student: its log-probs have a gradient of 0 in every case",
    ),
    "negative": (
        lambda i: i.student_logprobs_BT - i.teacher_logprobs_BT,
        r"a divergence is not negative: -\d+\.\d+, with",
    ),
    "not nought": (
        lambda i: -i.student_logprobs_BT,
        r"a divergence is nought at equality: \d+\.\d+, with student and teacher equal",
    ),
}


@pytest.mark.parametrize("name", BREAKING)
def test_a_loss_that_breaks_a_law_is_told_which_and_what_was_seen(name: str) -> None:
    broken, message = BREAKING[name]
    with pytest.raises(LawBrokenError, match=message):
        check_laws(broken, kind="divergence", needs=Needs())


def test_a_surrogate_may_be_negative() -> None:
    def advantage(inputs: LossInputs) -> Tensor:
        return inputs.student_logprobs_BT * (
            inputs.behavior_logprobs_BT - inputs.teacher_logprobs_BT
        )

    check_laws(gap, kind="divergence", needs=Needs())
    check_laws(advantage, kind="surrogate", needs=Needs())


def test_a_kind_that_does_not_exist_is_refused_where_it_is_written() -> None:
    with pytest.raises(ValueError, match="kind must be divergence or surrogate, got 'other'"):
        loss(kind="other")  # type: ignore[arg-type]
