"""Laws of divergences, weights and steps, over random cases."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.losses import (
    BlockGate,
    Divergence,
    LossInputs,
    PositionWeight,
    PrefixImportanceWeight,
    PruneWeight,
    merge,
    needs_normalization,
    objective,
    step_scale,
)
from student_trainer.losses.divergences import (
    forward_kl,
    local_support_matching,
    truncated_reverse_kl,
)
from student_trainer.losses.gates import block_gates
from student_trainer.losses.policy_gradients import sampled_reverse_kl, support_reverse_kl
from student_trainer.losses.prefix_weights import prefix_importance_weights
from student_trainer.losses.weights import mean_normalize, prune_weights, reliability
from tests.trainer.losses.loss_cases import DIVERGENCES, inputs_from

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
@given(seeds, vocabulary_sizes)
def test_student_topk_over_the_vocabulary_has_the_exact_gradient(seed: int, size: int) -> None:
    student, teacher = random_logits(seed, 1, 1, size)
    student.requires_grad_()
    logprobs = student.log_softmax(-1)
    surrogate = support_reverse_kl(
        logprobs, logprobs.detach(), teacher.log_softmax(-1), clip_epsilon=0.2, dual_clip=3.0
    )
    assert close(grad_of(surrogate, student), grad_of(exact_reverse_kl(student, teacher), student))


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
@given(seeds, vocabulary_sizes)
def test_support_matching_over_the_vocabulary_is_the_exact_divergence(seed: int, size: int) -> None:
    student, teacher = random_logits(seed, 1, 3, size)
    student.requires_grad_()
    exact = exact_reverse_kl(student, teacher)
    for loss in (
        local_support_matching(student.log_softmax(-1), teacher.log_softmax(-1)),
        truncated_reverse_kl(student.log_softmax(-1), teacher.log_softmax(-1), tail=False),
    ):
        assert close(loss, exact)
        assert close(grad_of(loss, student), grad_of(exact, student))


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


@law
@given(seeds, st.integers(2, 8))
def test_support_order_does_not_matter(seed: int, size: int) -> None:
    student, teacher = random_logits(seed, 2, 3, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    clips = {"clip_epsilon": 0.2, "dual_clip": 3.0}
    for function in (
        local_support_matching,
        lambda s, t: support_reverse_kl(s, s + 0.1, t, **clips),
    ):
        assert close(function(student, teacher), function(student[..., order], teacher[..., order]))


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
    weight = prefix_importance_weights(teacher, behavior, mask, gamma=gamma)
    top = torch.tensor(1.0 + gamma, dtype=torch.float32)
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
        assert mean_normalize(gates, mask)[mask].mean().item() == pytest.approx(1.0, abs=1e-6)
    assert (block_gates(behavior, behavior, mask, **chosen)[mask] == 1.0).all()


@law
@given(seeds)
def test_masked_positions_can_be_deleted(seed: int) -> None:
    mask, bad_events, student, behavior, teacher = random_rows(seed)
    chosen = {"block_size": 3, "tau": 1.0, "aggregate": "signed_mean"}
    for row in range(len(mask)):
        keep = mask[row]
        bad, new, old, target = (
            tensor[row : row + 1] for tensor in (bad_events, student, behavior, teacher)
        )
        for weigh in (
            lambda m, b, s, o, q: prune_weights(b, m, w_drop=0.1, w_base=0.5),
            lambda m, b, s, o, q: prefix_importance_weights(q, o, m, gamma=0.5),
            lambda m, b, s, o, q: block_gates(s, o, m, **chosen),
        ):
            whole = weigh(keep.unsqueeze(0), bad, new, old, target)
            dense = weigh(*(t[:, keep] for t in (keep.unsqueeze(0), bad, new, old, target)))
            assert close(whole[:, keep], dense, 1e-6)
            assert (whole[:, ~keep] == 0.0).all()


# The step

WEIGHTS: list[list[PositionWeight]] = [
    [],
    [PruneWeight(w_drop=0.1)],
    [PrefixImportanceWeight()],
    [BlockGate(block_size=4)],
    [PruneWeight(w_drop=0.1), PrefixImportanceWeight(), BlockGate(block_size=4, aggregate="rms")],
]
WIDTH, VOCABULARY, SUPPORT = 5, 12, 4


@dataclasses.dataclass
class Response:
    """One rollout for a linear student: features per position, and what the loss needs of it."""

    features_TD: Tensor
    sampled_T: Tensor
    teacher_TV: Tensor
    behavior_TV: Tensor
    bad_events_T: Tensor


def random_responses(seed: int, weight_DV: Tensor) -> list[Response]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 9, 4, 13, 6, 2]
    responses = []
    for length in lengths:
        dtype = weight_DV.dtype
        features = torch.randn(length, WIDTH, generator=generator, dtype=dtype)
        noise = torch.randn(2, length, VOCABULARY, generator=generator, dtype=dtype)
        behavior = (features @ weight_DV.detach() + 0.2 * noise[0]).log_softmax(-1)
        responses.append(
            Response(
                features_TD=features,
                sampled_T=torch.multinomial(behavior.exp(), 1, generator=generator)[:, 0],
                teacher_TV=(2 * noise[1]).log_softmax(-1),
                behavior_TV=behavior,
                bad_events_T=torch.rand(length, generator=generator) < 0.4,
            )
        )
    return responses


def pad(rows: list[Tensor], left: bool, fill: float) -> Tensor:
    """[B, T, ...]: shorter rows filled up on one side, with two columns to spare."""
    longest = max(len(row) for row in rows) + 2
    padded = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), fill)
    for target, row in zip(padded, rows, strict=True):
        start = longest - len(row) if left else 0
        target[start : start + len(row)] = row
    return padded


def collate(responses: list[Response], weight_DV: Tensor, left: bool) -> LossInputs:
    """Runs the student and gathers; everything fixed is NaN where padded."""
    mask = pad([torch.ones(len(r.sampled_T), dtype=torch.bool) for r in responses], left, False)
    student = (pad([r.features_TD for r in responses], left, 7.0) @ weight_DV).log_softmax(-1)
    teacher = pad([r.teacher_TV for r in responses], left, torch.nan)
    behavior = pad([r.behavior_TV for r in responses], left, torch.nan)
    sampled = pad([r.sampled_T for r in responses], left, 0)
    return inputs_from(
        student,
        behavior,
        teacher,
        sampled,
        teacher_ids_BTK=teacher.topk(SUPPORT).indices,
        student_ids_BTJ=behavior.topk(SUPPORT).indices,
        mask_BT=mask,
        bad_events_BT=pad([r.bad_events_T for r in responses], left, True),
    )


def step_gradient(
    micro_batches: list[list[Response]],
    weight_DV: Tensor,
    divergence: Divergence,
    weights: list[PositionWeight],
    *,
    left: bool,
) -> Tensor:
    """The gradient an optimiser would see after a step over these micro-batches."""
    weight_DV.grad = None
    parts = []
    for responses in micro_batches:
        inputs = collate(responses, weight_DV, left)
        sums = objective(inputs, divergence=divergence, weights=weights)
        sums.loss_sum.backward()
        parts.append(sums.detached())
    totals = merge(parts)
    normalize = needs_normalization(weights)
    scale = step_scale(totals.weight_sum.item(), totals.num_tokens.item(), normalize)
    assert weight_DV.grad is not None
    return weight_DV.grad * scale


EVERY_CHOICE_TWICE = [
    *itertools.product(DIVERGENCES.values(), [WEIGHTS[0], WEIGHTS[-1]]),
    *itertools.product([DIVERGENCES["sampled"], DIVERGENCES["matching"]], WEIGHTS[1:-1]),
]
"""Every divergence without and with weights, every weight on two divergences."""


@pytest.mark.parametrize(("divergence", "weights"), EVERY_CHOICE_TWICE)
@settings(max_examples=12, deadline=None)
@given(seed=seeds, left=st.booleans(), order=st.permutations(range(6)), cut=st.integers(1, 5))
def test_padding_order_and_micro_batches_leave_the_step_unchanged(
    divergence: Divergence,
    weights: list[PositionWeight],
    seed: int,
    left: bool,
    order: list[int],
    cut: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = (WIDTH, VOCABULARY), torch.float64
    weight_DV = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    responses = random_responses(seed, weight_DV)
    shuffled = [responses[index] for index in order]
    split = [shuffled[:cut], shuffled[cut:]]
    whole = step_gradient([responses], weight_DV, divergence, weights, left=False)
    found = step_gradient(split, weight_DV, divergence, weights, left=left)
    assert whole.norm() > 0
    # Sums in another order differ by a few roundings.
    assert (found - whole).norm() <= 1e-13 * whole.norm()
