"""Divergences over supports against their definitions: pytest tests/trainer/losses/test_supports.py

The definitions are written with sets of ids and probabilities over a whole small vocabulary, token
by token; values and gradients must agree in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.learner.batch import contained
from student_trainer.losses import LossInputs
from student_trainer.losses.divergences import (
    ForwardKL,
    GeneralizedJSD,
    LocalSupportMatching,
    TruncatedReverseKL,
    generalized_jsd,
)
from student_trainer.losses.entropy_aware import EntropyAwareKL
from student_trainer.losses.objective import Divergence, objective
from student_trainer.losses.policy_gradients import (
    ResidualReverseKL,
    SampledReverseKL,
    StudentTopKReverseKL,
)
from tests.trainer.losses.loss_cases import (
    DIVERGENCES,
    POLICY_GRADIENTS,
    SHAPE,
    VOCABULARY,
    Case,
    J,
    K,
    case,
    gradient,
)

torch.set_num_threads(1)

law = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31)
names = pytest.mark.parametrize("name", DIVERGENCES)


# The definitions, one position at a time. p: student, b: behaviour, q: teacher, log-probs over V.


def kl(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """sum of first (log first - log second), probabilities of matching classes."""
    terms = [a * (a.log() - c.log()) for a, c in zip(first, second, strict=True)]
    return torch.stack(terms).sum()


def on_support(logprobs: Tensor, ids: set[int], *, tail: bool = False) -> list[Tensor]:
    """Probabilities on the support, renormalised there or with the rest as one more class."""
    inside = [logprobs[v].exp() for v in sorted(ids)]
    if not tail:
        return [p / torch.stack(inside).sum() for p in inside]
    outside = [logprobs[v].exp() for v in range(VOCABULARY) if v not in ids]
    return [*inside, torch.stack(outside).sum()]


def matching(p: Tensor, q: Tensor, ids: set[int], loss: LocalSupportMatching) -> Tensor:
    student, teacher = (on_support(x, ids, tail=loss.tail) for x in (p, q))
    if loss.clip_log_ratio is None:
        return kl(student, teacher)
    bound = loss.clip_log_ratio
    terms = [
        a * (a.log() - c.log()).clamp(-bound, bound) for a, c in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).sum()


def clipped(p: Tensor, b: Tensor, reward: Tensor, loss: Any) -> Tensor:
    """PPO's clipped surrogate of one candidate, as a loss."""
    ratio = (p - b).exp()
    low, high = 1 - loss.clip_epsilon, 1 + loss.clip_epsilon
    gain = torch.min(ratio * reward, ratio.clamp(low, high) * reward)
    return -torch.max(gain, loss.dual_clip * reward) if reward < 0 else -gain


def reward_gradient(
    p: Tensor, b: Tensor, q: Tensor, ids: set[int], loss: StudentTopKReverseKL
) -> Tensor:
    weights = {
        v: {"student_p": b[v].exp(), "teacher_p": q[v].exp(), "uniform": torch.ones_like(b[v])}[
            loss.weight_mode
        ]
        for v in ids
    }
    if loss.support != "symmetric_difference" and ids:
        total = torch.stack(list(weights.values())).sum()
        weights = {v: weight / total for v, weight in weights.items()}
    terms = [clipped(p[v], b[v], -weights[v] * (b[v] - q[v]), loss) for v in sorted(ids)]
    return torch.stack(terms).sum() if terms else 0.0 * p.sum()


def candidates(loss: Any, teacher: set[int], student: set[int], sampled: int) -> set[int]:
    return {
        "teacher_topk": teacher,
        "student_topk_and_sampled": student | {sampled},
        "teacher_topk_and_sampled": teacher | {sampled},
        "only_stu": student,
        "only_tch": teacher,
        "intersection": student & teacher,
        "union": student | teacher,
        "symmetric_difference": student ^ teacher,
    }[loss.support]


def defined(
    loss: Divergence, p: Tensor, b: Tensor, q: Tensor, sampled: int, top: set[int], own: set[int]
) -> Tensor:
    """The divergence of one position from its definition."""
    if isinstance(loss, LocalSupportMatching):
        return matching(p, q, candidates(loss, top, own, sampled), loss)
    if isinstance(loss, StudentTopKReverseKL):
        return reward_gradient(p, b, q, candidates(loss, top, own, sampled), loss)
    if isinstance(loss, TruncatedReverseKL):
        if loss.tail:
            return kl(on_support(p, top, tail=True), on_support(q, top, tail=True))
        return torch.stack([p[v].exp() * (p[v] - q[v]) for v in sorted(top)]).sum()
    if isinstance(loss, ForwardKL):
        if loss.tail:
            return kl(on_support(q, top, tail=True), on_support(p, top, tail=True))
        return kl(on_support(q, top), [p[v].exp() for v in sorted(top)])
    if isinstance(loss, GeneralizedJSD):
        student, teacher = on_support(p, top, tail=True), on_support(q, top, tail=True)
        beta = loss.beta
        middle = [beta * c + (1 - beta) * a for a, c in zip(student, teacher, strict=True)]
        return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)
    if isinstance(loss, EntropyAwareKL):
        if loss.reverse == "sampled":
            total = clipped(p[sampled], b[sampled], q[sampled] - b[sampled], loss)
        else:
            student, teacher = (on_support(x, top, tail=loss.tail) for x in (p, q))
            total = kl(student, teacher)
        if -(q.exp() * q).sum() >= loss.entropy_threshold:
            total = total + defined(ForwardKL(tail=loss.tail), p, b, q, sampled, top, own)
        return total
    advantage = q[sampled] - b[sampled]
    if isinstance(loss, ResidualReverseKL):
        total = torch.stack(
            [clipped(p[v], b[v], b[v].exp() * (q[v] - b[v]), loss) for v in sorted(own)]
        ).sum()
        return total if sampled in own else total + clipped(p[sampled], b[sampled], advantage, loss)
    if isinstance(loss, SampledReverseKL) and loss.baseline == "student_topk":
        advantage = advantage - sum(b[v].exp() * (q[v] - b[v]) for v in sorted(own))
    return clipped(p[sampled], b[sampled], advantage, loss)


def by_definition(loss: Divergence, made: Case) -> Tensor:
    """[B, T] with gradient, position by position."""
    student = made.logits_BTV.log_softmax(-1)
    found = [
        defined(
            loss,
            student[at],
            made.behavior_BTV[at],
            made.teacher_BTV[at],
            int(made.sampled_BT[at]),
            set(made.teacher_ids_BTK[at].tolist()),
            set(made.student_ids_BTJ[at].tolist()),
        )
        for at in itertools.product(*map(range, SHAPE))
    ]
    return torch.stack(found).view(SHAPE)


@names
@law
@given(seed=seeds)
def test_value_and_gradient_are_those_of_the_definition(name: str, seed: int) -> None:
    made, loss = case(seed), DIVERGENCES[name]
    found, expected = loss(made.inputs_for(loss)), by_definition(loss, made)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(
        gradient(found, made.logits_BTV),
        gradient(expected, made.logits_BTV),
        rtol=1e-9,
        atol=1e-9,
    )


def test_cases_hold_every_kind_of_position() -> None:
    inputs = [case(seed).inputs() for seed in range(20)]
    for flags in (
        torch.cat([i.student_topk.in_teacher_topk_BTN.flatten() for i in inputs]),
        torch.cat([i.sampled.in_student_topk_BTN.flatten() for i in inputs]),
    ):
        assert flags.any()
        assert not flags.all()
    unsure = torch.cat([i.teacher_entropies_BT.flatten() for i in inputs]) >= 0.8
    assert unsure.any()
    assert not unsure.all()


# Limits


def exact(name: str, made: Case) -> Tensor:
    """KL over the whole vocabulary, [B, T], with gradient."""
    p, q = made.logits_BTV.log_softmax(-1), made.teacher_BTV
    reverse, forward = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    return {"reverse": reverse, "forward": forward, "both": reverse + forward}[name]


@pytest.mark.parametrize(
    ("loss", "limit"),
    [
        (LocalSupportMatching(), "reverse"),
        (LocalSupportMatching(tail=True), "reverse"),
        (LocalSupportMatching(support="student_topk_and_sampled"), "reverse"),
        (LocalSupportMatching(support="teacher_topk_and_sampled"), "reverse"),
        (TruncatedReverseKL(tail=False), "reverse"),
        (TruncatedReverseKL(tail=True), "reverse"),
        (ForwardKL(), "forward"),
        (ForwardKL(tail=False), "forward"),
        (EntropyAwareKL(entropy_threshold=0.0), "both"),
        (EntropyAwareKL(entropy_threshold=0.0, tail=True), "both"),
        (EntropyAwareKL(entropy_threshold=1e9), "reverse"),
    ],
)
@law
@given(seed=seeds)
def test_support_of_the_whole_vocabulary_is_exact(loss: Divergence, limit: str, seed: int) -> None:
    made = case(seed, k=VOCABULARY, j=VOCABULARY)
    found, expected = loss(made.inputs_for(loss)), exact(limit, made)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    expected_gradient = gradient(expected, made.logits_BTV)
    found_gradient = gradient(found, made.logits_BTV)
    assert torch.allclose(found_gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@law
@given(seed=seeds, support=st.sampled_from(["only_stu", "only_tch", "intersection", "union"]))
def test_rewards_over_the_whole_vocabulary_have_the_exact_gradient(seed: int, support: Any) -> None:
    made = case(seed, k=VOCABULARY, j=VOCABULARY, off_policy=0.0)
    found = StudentTopKReverseKL(support=support)(made.inputs())
    expected = gradient(exact("reverse", made), made.logits_BTV)
    assert torch.allclose(gradient(found, made.logits_BTV), expected, rtol=1e-9, atol=1e-9)


@law
@given(seed=seeds)
def test_jsd_over_its_share_tends_to_forward_and_to_reverse_kl(seed: int) -> None:
    made = case(seed, k=VOCABULARY)
    listed = made.inputs().teacher_topk
    assert listed is not None
    pair = listed.student_logprobs_BTN, listed.teacher_logprobs_BTN
    for beta, share, limit in ((1e-6, 1e-6, "forward"), (1 - 1e-6, 1e-6, "reverse")):
        found = generalized_jsd(*pair, beta=beta) / share
        expected = exact(limit, made)
        # The next term is of the order of beta times the second moment of the ratio.
        assert torch.allclose(found, expected, rtol=0.02, atol=1e-4)
        assert torch.allclose(
            gradient(found, made.logits_BTV),
            gradient(expected, made.logits_BTV),
            rtol=0.02,
            atol=1e-2,
        )


@law
@given(seed=seeds, beta=st.floats(0.01, 0.99))
def test_jsd_is_bounded_by_the_entropy_of_its_coin_and_symmetric_at_a_half(
    seed: int, beta: float
) -> None:
    made = case(seed)
    found = GeneralizedJSD(beta=beta)(made.inputs())
    assert (found >= -1e-12).all()
    assert (found <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-12).all()
    student = made.logits_BTV.detach().log_softmax(-1)
    swapped = dataclasses.replace(made, logits_BTV=made.teacher_BTV, teacher_BTV=student)
    mirrored = GeneralizedJSD(beta=1 - beta)(swapped.inputs())
    assert torch.allclose(found, mirrored, rtol=1e-9, atol=1e-12)


DIVERGENCES_AT_LEAST_ZERO = [
    name for name in DIVERGENCES if name not in {"truncated", "matching_clipped", *POLICY_GRADIENTS}
]


@pytest.mark.parametrize("name", DIVERGENCES_AT_LEAST_ZERO)
@law
@given(seed=seeds)
def test_divergence_is_never_negative(name: str, seed: int) -> None:
    made = case(seed)
    assert (DIVERGENCES[name](made.inputs_for(DIVERGENCES[name])) >= -1e-12).all()


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in DIVERGENCES_AT_LEAST_ZERO
        if n not in ("forward_renormalised", "entropy_aware")  # 0 needs a student without a tail
    ],
)
def test_divergence_of_equal_policies_is_zero_and_flat(name: str) -> None:
    made = case(1)
    made.logits_BTV = made.teacher_BTV.clone().requires_grad_()
    found = DIVERGENCES[name](made.inputs_for(DIVERGENCES[name]))
    assert torch.allclose(found, torch.zeros(SHAPE, dtype=torch.float64), atol=1e-12)
    assert gradient(found, made.logits_BTV).abs().max() < 1e-12


# Sets


def reward(support: Any, made: Case, **changes: Any) -> Tensor:
    return StudentTopKReverseKL(support=support)(made.inputs(**changes))


def test_identical_lists_make_every_union_the_students_top_k() -> None:
    made = case(3)
    made.teacher_ids_BTK = made.student_ids_BTJ.flip(-1)
    for support in ("only_tch", "intersection", "union"):
        found, expected = reward(support, made), reward("only_stu", made)
        assert torch.allclose(found, expected, rtol=1e-12)
        assert torch.allclose(
            gradient(found, made.logits_BTV), gradient(expected, made.logits_BTV), rtol=1e-12
        )


def zero_without_gradient(found: Tensor, made: Case) -> bool:
    return bool((found == 0.0).all() and (gradient(found, made.logits_BTV) == 0.0).all())


def test_symmetric_difference_of_identical_lists_is_exactly_nothing() -> None:
    made = case(3)
    made.teacher_ids_BTK = made.student_ids_BTJ.flip(-1)
    for mode in ("student_p", "teacher_p", "uniform"):
        loss = StudentTopKReverseKL(support="symmetric_difference", weight_mode=mode)
        assert zero_without_gradient(loss(made.inputs()), made)


def test_intersection_of_disjoint_lists_is_exactly_nothing() -> None:
    made = case(4)
    made.student_ids_BTJ = torch.arange(J).expand(*SHAPE, J)
    made.teacher_ids_BTK = torch.arange(J, J + K).expand(*SHAPE, K)
    for mode in ("student_p", "teacher_p", "uniform"):
        loss = StudentTopKReverseKL(support="intersection", weight_mode=mode)
        assert zero_without_gradient(loss(made.inputs()), made)


@names
@law
@given(seed=seeds)
def test_order_of_the_candidates_changes_nothing(name: str, seed: int) -> None:
    made, loss = case(seed), DIVERGENCES[name]
    generator = torch.Generator().manual_seed(seed)
    shuffled = dataclasses.replace(
        made,
        teacher_ids_BTK=made.teacher_ids_BTK[..., torch.randperm(K, generator=generator)],
        student_ids_BTJ=made.student_ids_BTJ[..., torch.randperm(J, generator=generator)],
    )
    found, expected = loss(shuffled.inputs()), loss(made.inputs())
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(
        gradient(found, made.logits_BTV),
        gradient(expected, made.logits_BTV),
        rtol=1e-10,
        atol=1e-13,
    )


@law
@given(seed=seeds, num_ids=st.integers(1, 6), num_others=st.integers(0, 6))
def test_contained_is_membership_in_the_row(seed: int, num_ids: int, num_others: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, (2, 3, num_ids), generator=generator)
    others = torch.randint(8, (2, 3, num_others), generator=generator)
    expected = [
        [[v in others[b, t].tolist() for v in ids[b, t].tolist()] for t in range(3)]
        for b in range(2)
    ]
    assert contained(ids, others).tolist() == expected


# What must not count


@names
@pytest.mark.parametrize("hole", [math.nan, -math.inf, math.inf])
def test_nothing_at_a_masked_position_reaches_value_or_gradient(name: str, hole: float) -> None:
    made, loss = case(5), DIVERGENCES[name]
    mask_BT = torch.ones(SHAPE, dtype=torch.bool)
    mask_BT[0, 1] = mask_BT[1, 3] = False
    clean = objective(made.inputs(mask_BT=mask_BT), divergence=loss)
    (expected,) = torch.autograd.grad(clean.loss_sum, made.logits_BTV)
    holes = ~mask_BT.unsqueeze(-1)
    dirty = dataclasses.replace(
        made,
        behavior_BTV=made.behavior_BTV.masked_fill(holes, hole),
        teacher_BTV=made.teacher_BTV.masked_fill(holes, hole),
    )
    sums = objective(dirty.inputs(mask_BT=mask_BT), divergence=loss)
    (found,) = torch.autograd.grad(sums.loss_sum, made.logits_BTV)
    assert sums.loss_sum.item() == clean.loss_sum.item()
    assert torch.equal(found, expected)
    assert (found[~mask_BT] == 0.0).all()


@names
def test_a_hole_at_a_valid_position_is_refused(name: str) -> None:
    made = case(6)
    made.teacher_BTV[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"\.teacher_\w+ is missing \(not finite\) at 1 valid"):
        DIVERGENCES[name](made.inputs())


def test_an_excluded_candidate_may_be_anything() -> None:
    inputs = case(7).inputs()
    students = inputs.student_topk
    assert students is not None
    assert students.in_teacher_topk_BTN is not None
    anything = torch.where(students.in_teacher_topk_BTN, students.student_logprobs_BTN, -900.0)
    moved = changed(inputs, "student_topk.student_logprobs_BTN", anything)
    loss = StudentTopKReverseKL(support="intersection")
    assert torch.equal(loss(moved), loss(inputs))


# Bad input


def changed(inputs: LossInputs, name: str, value: Tensor | None) -> LossInputs:
    """With another tensor, or none, under a name such as teacher_topk.behavior_logprobs_BTN."""
    listed, _, inner = name.rpartition(".")
    if listed:
        value = dataclasses.replace(getattr(inputs, listed), **{inner: value})
    return dataclasses.replace(inputs, **{listed or inner: value})


@pytest.mark.parametrize(
    ("loss", "missing", "remedy"),
    [
        ("matching", "teacher_topk", "score the rollouts with the teacher's top-K"),
        ("truncated", "teacher_topk", "score the rollouts with the teacher's top-K"),
        ("jsd", "teacher_topk", "score the rollouts with the teacher's top-K"),
        ("only_stu", "student_topk.behavior_logprobs_BTN", "roll out with the student's top-k"),
        ("only_stu", "student_topk", "send its ids to the teacher"),
        ("entropy_aware", "teacher_entropies_BT", "want_entropy"),
        ("only_tch", "teacher_topk.behavior_logprobs_BTN", "recompute"),
        ("union", "teacher_topk.behavior_logprobs_BTN", "recompute"),
        ("union", "teacher_topk.in_student_topk_BTN", "compare the teacher's top-k ids"),
        ("intersection", "student_topk.in_teacher_topk_BTN", "compare the student's top-k ids"),
        ("symmetric_difference", "student_topk", "send its ids to the teacher"),
        ("matching_v2", "student_topk", "send its ids to the teacher"),
        ("matching_v2", "sampled.in_student_topk_BTN", "compare the sampled ids"),
        ("matching_v3", "sampled.in_teacher_topk_BTN", "compare the sampled ids"),
    ],
)
def test_an_absent_input_is_named_with_what_provides_it(
    loss: str, missing: str, remedy: str
) -> None:
    inputs = changed(case(0).inputs(), missing, None)
    with pytest.raises(ValueError, match=f"{missing} is needed and absent: .*{remedy}"):
        objective(inputs, divergence=DIVERGENCES[loss])


@pytest.mark.parametrize(
    ("loss", "absent"),
    [
        ("intersection", "teacher_topk"),
        ("intersection", "teacher_topk.behavior_logprobs_BTN"),
        ("only_stu", "teacher_topk"),
        ("only_tch", "student_topk"),
        ("matching_v2", "student_topk.behavior_logprobs_BTN"),
        ("matching_v2", "teacher_topk"),
        ("matching_v3", "sampled.in_student_topk_BTN"),
        ("matching_v3", "student_topk"),
    ],
)
def test_a_support_needs_nothing_of_the_list_that_it_leaves_out(loss: str, absent: str) -> None:
    inputs = case(0).inputs()
    without = changed(inputs, absent, None)
    assert torch.equal(DIVERGENCES[loss](without), DIVERGENCES[loss](inputs))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sampled.in_teacher_topk_BTN", torch.ones(*SHAPE, 1), r"bool of shape \(2, 4, 1\)"),
        ("sampled.in_teacher_topk_BTN", torch.ones(2, 3, dtype=torch.bool), r"bool of shape"),
        ("student_topk.in_teacher_topk_BTN", torch.ones(2, 4, 3, dtype=torch.bool), r"\(2, 4, 4\)"),
        ("response_ids_BT", torch.zeros(SHAPE, dtype=torch.int32), r"int64 of shape \(2, 4\)"),
        ("teacher_entropies_BT", torch.zeros(2, 3), r"has shape \(2, 3\)"),
        ("student_entropies_BT", torch.zeros(SHAPE, requires_grad=True), "must not carry gradient"),
    ],
)
def test_a_misfit_is_refused_by_name(name: str, value: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{reason}"):
        changed(case(0).inputs(), name, value)


def test_tail_and_clip_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="tail and clip_log_ratio exclude each other"):
        LocalSupportMatching(tail=True, clip_log_ratio=5.0)
