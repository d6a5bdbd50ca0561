"""Whose gradient a loss has on average over the sampled token: every token of a small vocabulary
drawn in turn, with its own probability, on policy.

Run: pytest tests/trainer/losses/test_expected_gradients.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.losses.divergences import (
    ForwardKL,
    GeneralizedJSD,
    LocalSupportMatching,
    TruncatedReverseKL,
)
from student_trainer.losses.entropy_aware import EntropyAwareKL
from student_trainer.losses.laws import inputs_of
from student_trainer.losses.objective import Divergence
from student_trainer.losses.policy_gradients import (
    ResidualReverseKL,
    SampledReverseKL,
    StudentTopKReverseKL,
    SuppressUnlikely,
)

torch.set_num_threads(1)

VOCABULARY, K = 7, 3
law = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
Expected = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of log-probs p and q over V, and the ids of the teacher's and the student's top-k."""


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


def classes(p: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of some ids and of everything else as one more class."""
    rest = torch.ones(len(p), dtype=torch.bool)
    rest[ids] = False
    return torch.cat([p[ids], p[rest].logsumexp(0, keepdim=True)])


def reverse(p: Tensor, q: Tensor, top: Tensor, own: Tensor) -> Tensor:
    return kl(p, q)


def forward_on_top(p: Tensor, q: Tensor, top: Tensor, own: Tensor) -> Tensor:
    return kl(q[top].log_softmax(0), p[top])


def mixture(p: Tensor, q: Tensor, top: Tensor, own: Tensor) -> Tensor:
    p, q = classes(p, top), classes(q, top)
    m = (0.3 * q.exp() + 0.7 * p.exp()).log()
    return 0.3 * kl(q, m) + 0.7 * kl(p, m)


NAMED: dict[str, tuple[Divergence, Expected]] = {
    "sampled_reverse_kl": (SampledReverseKL(), reverse),
    "vOPD": (SampledReverseKL(baseline="student_topk"), reverse),
    "residual_reverse_kl": (ResidualReverseKL(), reverse),
    "local_support_matching": (
        LocalSupportMatching(),
        lambda p, q, top, own: kl(p[top].log_softmax(0), q[top].log_softmax(0)),
    ),
    "truncated_reverse_kl with a tail": (
        TruncatedReverseKL(tail=True),
        lambda p, q, top, own: kl(classes(p, top), classes(q, top)),
    ),
    "forward_kl": (ForwardKL(), lambda p, q, top, own: kl(classes(q, top), classes(p, top))),
    "forward_kl without a tail": (ForwardKL(tail=False), forward_on_top),
    "generalized_jsd": (GeneralizedJSD(beta=0.3), mixture),
    "entropy_aware_kl as released": (
        EntropyAwareKL(reverse="sampled", entropy_threshold=0.0),
        lambda *given: reverse(*given) + forward_on_top(*given),
    ),
    "student_topk_reverse_kl over all of V": (
        StudentTopKReverseKL(),
        lambda p, q, top, own: kl(p, q) if len(own) == VOCABULARY else kl(p, p),
    ),
}


def drawn(seed: int, k: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of the student, with gradient, log-probs of the teacher, and both top-k."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = 1.5 * torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64)
    q = teacher.log_softmax(0)
    return logits.requires_grad_(), q, q.topk(k).indices, logits.topk(k).indices


def gradients(loss: Divergence, seed: int, k: int = K) -> tuple[Tensor, Tensor]:
    """[V, V] with respect to the logits, by the token that was sampled; and p."""
    logits, q, top, own = drawn(seed, k)
    found = []
    for token in range(VOCABULARY):
        p = logits.log_softmax(0)
        inputs = inputs_of(
            p.reshape(1, 1, -1),
            p.detach().reshape(1, 1, -1),
            q.reshape(1, 1, -1),
            torch.tensor([[token]]),
            teacher_ids_BTK=top.reshape(1, 1, -1),
            student_ids_BTJ=own.reshape(1, 1, -1),
            mask_BT=torch.ones(1, 1, dtype=torch.bool),
        )
        found.append(torch.autograd.grad(loss(inputs).sum(), logits)[0])
    return torch.stack(found), logits.detach().softmax(0)


def expected_gradient(expected: Expected, seed: int, k: int = K) -> Tensor:
    logits, q, top, own = drawn(seed, k)
    return torch.autograd.grad(expected(logits.log_softmax(0), q, top, own), logits)[0]


@pytest.mark.parametrize("name", NAMED)
@law
@given(seed=seeds)
def test_on_average_a_loss_has_the_gradient_of_what_it_names(name: str, seed: int) -> None:
    loss, expected = NAMED[name]
    k = VOCABULARY if "all of V" in name else K
    by_token, p = gradients(loss, seed, k)
    assert torch.allclose(p @ by_token, expected_gradient(expected, seed, k), atol=1e-9)


@law
@given(seed=seeds)
def test_the_policy_gradient_over_a_part_of_v_is_that_of_no_kl(seed: int) -> None:
    """What is published: weights renormalised on the student's top-k, log-probs over V."""
    by_token, p = gradients(StudentTopKReverseKL(), seed)
    whole = expected_gradient(reverse, seed)
    on_own = expected_gradient(
        lambda p, q, top, own: kl(p[own].log_softmax(0), q[own].log_softmax(0)), seed
    )
    found = p @ by_token
    assert (found - whole).abs().max() > 1e-6
    assert (found - on_own).abs().max() > 1e-6


@law
@given(seed=seeds)
def test_a_constant_advantage_says_nothing_of_a_token_alone(seed: int) -> None:
    by_token, p = gradients(SuppressUnlikely(), seed)
    assert torch.allclose(p @ by_token, torch.zeros(VOCABULARY, dtype=torch.float64), atol=1e-12)
    assert (by_token.abs().sum(1) > 0).all()


def test_baseline_and_residual_have_less_variance_than_the_sampled_token() -> None:
    """Summed over 200 pairs, of which single ones may differ."""

    def variance(loss: Divergence) -> float:
        total = 0.0
        for seed in range(200):
            by_token, p = gradients(loss, seed)
            deviation = by_token - p @ by_token
            total += float(p @ deviation.square().sum(1))
        return total

    plain = variance(SampledReverseKL(clip_epsilon=None, dual_clip=None))
    with_baseline = variance(
        SampledReverseKL(baseline="student_topk", clip_epsilon=None, dual_clip=None)
    )
    residual = variance(ResidualReverseKL(clip_epsilon=None, dual_clip=None))
    assert residual < with_baseline < plain
    assert residual < 0.5 * plain
