"""Laws of divergences, weights and steps, over random cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.losses.divergences import (
    forward_kl,
    local_support_matching,
    truncated_reverse_kl,
)
from student_trainer.losses.policy_gradients import sampled_reverse_kl, support_reverse_kl
from student_trainer.losses.prefix_weights import prefix_importance_weights, sampled_advantages
from student_trainer.losses.weights import prune_weights, reliability
from tests.trainer.losses.loss_cases import block_gates, mean_normalized

torch.set_num_threads(1)

law = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
vocabulary_sizes = st.integers(2, 8)


def random_logits(seed: int, *shape: int, count: int = 2) -> list[Tensor]:
    """Independent logits of the same shape, spread widely enough for log-ratios of several nats."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def exact_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """E_{v ~ student}[log p_student(v) - log p_teacher(v)] from logits, by enumeration over V."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def grad_of(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


# Divergences


@law
@given(seeds, vocabulary_sizes, st.sampled_from([None, 0.2]), st.sampled_from([None, 3.0]))
def test_on_policy_expected_sampled_gradient_is_the_exact_one(
    seed: int, size: int, clip_epsilon: float | None, dual_clip: float | None
) -> None:
    student, teacher = random_logits(seed, 1, size)
    student.requires_grad_()
    logprobs = student.log_softmax(-1)  # every token of V as if sampled once, [1, V]
    surrogate = sampled_reverse_kl(
        logprobs,
        logprobs.detach(),
        teacher.log_softmax(-1),
        clip_epsilon=clip_epsilon,
        dual_clip=dual_clip,
    )
    expected_gradient = grad_of(logprobs.detach().exp() * surrogate, student)
    assert close(expected_gradient, grad_of(exact_reverse_kl(student, teacher), student))


@law
@given(seeds, st.integers(3, 8))
def test_student_topk_pushes_tokens_outside_by_the_sum_of_rewards(seed: int, size: int) -> None:
    student, teacher = random_logits(seed, 1, 1, size)
    student.requires_grad_()
    logprobs, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    ids = logprobs.topk(2).indices
    inside, targets = logprobs.gather(-1, ids), teacher.gather(-1, ids)
    shares = inside.detach().softmax(-1)
    rewards = shares * (targets - inside.detach())
    surrogate = support_reverse_kl(
        inside, inside.detach(), targets, clip_epsilon=0.2, dual_clip=3.0
    )
    outside = torch.ones(1, 1, size, dtype=torch.bool).scatter(-1, ids, False)
    expected = logprobs.detach().exp() * rewards.sum()
    assert close(grad_of(surrogate, student)[outside], expected[outside])


@law
@given(seeds, st.integers(3, 8), st.data())
def test_support_matching_is_a_divergence_with_a_centred_gradient_on_its_support(
    seed: int, size: int, data: st.DataObject
) -> None:
    student, teacher = random_logits(seed, 1, 3, size)
    student.requires_grad_()
    ids = teacher.topk(data.draw(st.integers(1, size - 1))).indices
    inside, targets = student.gather(-1, ids), teacher.gather(-1, ids)
    loss = local_support_matching(inside, targets)
    assert (loss >= -1e-12).all()
    assert close(local_support_matching(targets, targets), torch.zeros(1, 3).double())
    log_ratio = (inside.log_softmax(-1) - targets.log_softmax(-1)).detach()
    expected = inside.softmax(-1).detach() * (log_ratio - loss.detach().unsqueeze(-1))
    gradient = grad_of(loss, student)
    assert close(gradient.gather(-1, ids), expected)
    assert (gradient.scatter(-1, ids, 0.0) == 0.0).all()
    through_logprobs = local_support_matching(student.log_softmax(-1).gather(-1, ids), targets)
    assert close(through_logprobs, loss)
    assert close(grad_of(through_logprobs, student), gradient, 1e-13)


@law
@given(seeds, st.integers(2, 8), st.data())
def test_tail_bucket_lies_between_zero_and_the_exact_divergence(
    seed: int, size: int, data: st.DataObject
) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in random_logits(seed, 1, 3, size))
    ids = teacher.topk(data.draw(st.integers(1, size))).indices
    found = truncated_reverse_kl(student.gather(-1, ids), teacher.gather(-1, ids), tail=True)
    assert (found >= -1e-9).all()
    assert (found <= exact_reverse_kl(student, teacher) + 1e-6).all()


@law
@given(seeds, st.integers(2, 8), st.data())
def test_forward_kl_lies_between_zero_and_the_exact_one_with_gradient_p_minus_q(
    seed: int, size: int, data: st.DataObject
) -> None:
    student, teacher = random_logits(seed, 1, 3, size)
    student.requires_grad_()
    num_support = data.draw(st.integers(1, size))
    teacher = teacher.log_softmax(-1)
    ids = teacher.topk(num_support).indices
    found = forward_kl(student.log_softmax(-1).gather(-1, ids), teacher.gather(-1, ids))
    exact = (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1)
    assert (found >= -1e-9).all()
    assert (found <= exact + 1e-6).all()
    if num_support == size:
        assert close(found, exact, 1e-5)
        expected = student.softmax(-1) - teacher.exp()
        assert close(grad_of(found, student), expected, 1e-5)


# Weights


def random_rows(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mask, bad events, student, behaviour and teacher log-probs, [B, T] with holes, float32."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 40, (2,), generator=generator).tolist()
    mask = torch.rand(size, generator=generator) < 0.8
    bad_events = torch.rand(size, generator=generator) < 0.3
    student, behavior, teacher = (-4 * torch.rand(3, *size, generator=generator)).unbind()
    return mask, bad_events, student, behavior, teacher


def valid_differences(weight: Tensor, mask: Tensor) -> Tensor:
    """Differences of consecutive valid weights, over all rows."""
    return torch.cat([row[keep].diff() for row, keep in zip(weight, mask, strict=True)])


@law
@given(seeds, st.sampled_from([0.0, 0.3, 0.5, 2.0]))
def test_importance_starts_at_one_plus_gamma_and_never_rises(seed: int, gamma: float) -> None:
    mask, _, _, behavior, teacher = random_rows(seed)
    advantage = sampled_advantages(teacher, behavior, mask)
    weight = prefix_importance_weights(advantage, mask, gamma=gamma)
    top = torch.tensor(1.0 + gamma, dtype=torch.float64)
    assert ((weight >= 1.0) & (weight <= top))[mask].all()
    assert (valid_differences(weight, mask) <= 0.0).all()
    for row, keep in zip(weight, mask, strict=True):
        assert (row[keep][:1] == top).all()


@law
@given(seeds, st.floats(0.001, 1.0), st.floats(0.0, 2.0))
def test_prune_stays_in_its_range_and_never_rises(seed: int, w_drop: float, w_base: float) -> None:
    mask, bad_events, *_ = random_rows(seed)
    found = reliability(bad_events, mask, w_drop=w_drop)
    assert ((found >= 0.0) & (found <= 1.0)).all()
    assert (valid_differences(found, mask) <= 0.0).all()
    clean = reliability(torch.zeros_like(mask), mask, w_drop=w_drop)
    assert (clean[mask] == 1.0).all()
    weight = prune_weights(bad_events, mask, w_drop=w_drop, w_base=w_base)
    assert close(weight[mask], found[mask] + w_base, 1e-6)


@law
@given(seeds, st.integers(1, 12), st.sampled_from(["signed_mean", "mean_abs", "rms"]))
def test_gates_are_constant_in_a_block_and_average_one(
    seed: int, block_size: int, aggregate: str
) -> None:
    mask, _, student, behavior, _ = random_rows(seed)
    chosen = {"block_size": block_size, "tau": 1.0, "aggregate": aggregate}
    gates = block_gates(student.requires_grad_(), behavior, mask, **chosen)
    assert not gates.requires_grad
    assert ((gates > 0.0) & (gates <= 1.0))[mask].all()
    for row, keep in zip(gates, mask, strict=True):
        for block in row[keep].split(block_size):
            assert (block == block[:1]).all()
    if mask.any():
        assert mean_normalized(gates, mask)[mask].mean().item() == pytest.approx(1.0, abs=1e-6)
    assert (block_gates(behavior, behavior, mask, **chosen)[mask] == 1.0).all()
