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
from student_trainer.losses import (
    Divergence,
    EntropyAwareKL,
    ForwardKL,
    GeneralizedJSD,
    LocalSupportMatching,
    LossInputs,
    StudentTopKReverseKL,
    TruncatedReverseKL,
    objective,
)
from tests.trainer.losses.loss_cases import DIVERGENCES, POLICY_GRADIENTS, inputs_from

torch.set_num_threads(1)

law = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31)
SHAPE, VOCABULARY, K, J = (2, 4), 9, 3, 4
names = pytest.mark.parametrize("name", DIVERGENCES)


@dataclasses.dataclass
class Case:
    """Three policies over all of V and who named which candidates; student logits are the leaf."""

    logits_BTV: Tensor
    behavior_BTV: Tensor
    teacher_BTV: Tensor
    sampled_BT: Tensor
    teacher_ids_BTK: Tensor
    student_ids_BTJ: Tensor

    def inputs(self, **changes: Any) -> LossInputs:
        """As a batch hands them over, without padding."""
        return inputs_from(
            self.logits_BTV.log_softmax(-1),
            self.behavior_BTV,
            self.teacher_BTV,
            self.sampled_BT,
            teacher_ids_BTK=self.teacher_ids_BTK,
            student_ids_BTJ=self.student_ids_BTJ,
            **{"mask_BT": torch.ones_like(self.sampled_BT, dtype=torch.bool)} | changes,
        )


def case(seed: int, *, k: int = K, j: int = J, off_policy: float = 0.3) -> Case:
    generator = torch.Generator().manual_seed(seed)
    behavior, teacher, step = (
        torch.randn(*SHAPE, VOCABULARY, generator=generator, dtype=torch.float64)
        * torch.tensor(scale, dtype=torch.float64)
        for scale in (1.5, 1.5, off_policy)
    )
    logits = (behavior + step).requires_grad_()
    behavior, teacher = behavior.log_softmax(-1), teacher.log_softmax(-1)
    return Case(
        logits_BTV=logits,
        behavior_BTV=behavior,
        teacher_BTV=teacher,
        sampled_BT=torch.randint(VOCABULARY, SHAPE, generator=generator),
        teacher_ids_BTK=teacher.topk(k).indices,
        student_ids_BTJ=behavior.topk(j).indices,
    )


def gradient(loss_BT: Tensor, leaf: Tensor) -> Tensor:
    """Of a differently weighted sum over positions, so that no two positions may be swapped."""
    coefficients = torch.arange(1, loss_BT.numel() + 1, dtype=loss_BT.dtype).view_as(loss_BT)
    (found,) = torch.autograd.grad((coefficients * loss_BT).sum(), leaf, retain_graph=True)
    return found


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
        student, teacher = (on_support(x, top, tail=loss.tail) for x in (p, q))
        total = kl(student, teacher)
        if -(q.exp() * q).sum() >= loss.entropy_threshold:
            total = total + defined(ForwardKL(tail=loss.tail), p, b, q, sampled, top, own)
        return total
    return clipped(p[sampled], b[sampled], q[sampled] - b[sampled], loss)


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
    found, expected = loss(made.inputs()), by_definition(loss, made)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(
        gradient(found, made.logits_BTV),
        gradient(expected, made.logits_BTV),
        rtol=1e-9,
        atol=1e-9,
    )


def test_cases_hold_every_kind_of_position() -> None:
    inputs = [case(seed).inputs() for seed in range(20)]
    for name in ("student_topk_in_teacher_topk_BTJ", "sampled_in_student_topk_BT"):
        flags = torch.cat([getattr(i, name).flatten() for i in inputs])
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
        (EntropyAwareKL(entropy_threshold=math.inf), "reverse"),
    ],
)
@law
@given(seed=seeds)
def test_support_of_the_whole_vocabulary_is_exact(loss: Divergence, limit: str, seed: int) -> None:
    made = case(seed, k=VOCABULARY, j=VOCABULARY)
    found, expected = loss(made.inputs()), exact(limit, made)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    expected_gradient = gradient(expected, made.logits_BTV)
    # A class of its own for an outside that is empty is given 1e-7 of mass.
    assert torch.allclose(gradient(found, made.logits_BTV), expected_gradient, rtol=0, atol=1e-6)


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
    for beta, share, limit in ((1e-6, 1e-6, "forward"), (1 - 1e-6, 1e-6, "reverse")):
        found = GeneralizedJSD(beta=beta)(made.inputs()) / share
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
    assert (DIVERGENCES[name](made.inputs()) >= -1e-12).all()


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
    found = DIVERGENCES[name](made.inputs())
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
    with pytest.raises(ValueError, match=r"teacher_\w+ is missing \(not finite\) at 1 valid"):
        DIVERGENCES[name](made.inputs())


def test_an_excluded_candidate_may_be_anything() -> None:
    inputs = case(7).inputs()
    inside = inputs.student_topk_in_teacher_topk_BTJ
    at_student = inputs.student_logprobs_at_student_topk_BTJ
    assert inside is not None
    assert at_student is not None
    moved = dataclasses.replace(
        inputs, student_logprobs_at_student_topk_BTJ=torch.where(inside, at_student, -900.0)
    )
    loss = StudentTopKReverseKL(support="intersection")
    assert torch.equal(loss(moved), loss(inputs))


# Bad input


@pytest.mark.parametrize(
    ("loss", "missing", "remedy"),
    [
        ("entropy_aware", "teacher_entropies_BT", "want_entropy"),
        ("only_tch", "behavior_logprobs_at_teacher_topk_BTK", "recompute"),
        ("union", "behavior_logprobs_at_teacher_topk_BTK", "recompute"),
        ("union", "teacher_topk_in_student_topk_BTK", "compare the teacher's top-k ids"),
        ("intersection", "student_topk_in_teacher_topk_BTJ", "compare the student's top-k ids"),
        ("symmetric_difference", "teacher_logprobs_at_student_topk_BTJ", "send the student's"),
        ("matching_v2", "teacher_logprobs_at_student_topk_BTJ", "send the student's top-k ids"),
        ("matching_v2", "sampled_in_student_topk_BT", "compare the sampled ids"),
        ("matching_v3", "sampled_in_teacher_topk_BT", "compare the sampled ids"),
        ("jsd", "student_logprobs_at_teacher_topk_BTK", "gather the student"),
    ],
)
def test_an_absent_input_is_named_with_what_provides_it(
    loss: str, missing: str, remedy: str
) -> None:
    inputs = dataclasses.replace(case(0).inputs(), **{missing: None})
    with pytest.raises(ValueError, match=f"{missing} is needed and absent: .*{remedy}"):
        objective(inputs, divergence=DIVERGENCES[loss])


@pytest.mark.parametrize(
    ("loss", "absent"),
    [
        ("intersection", "behavior_logprobs_at_teacher_topk_BTK"),
        ("only_tch", "behavior_topk_logprobs_BTJ"),
        ("matching_v2", "behavior_topk_logprobs_BTJ"),
        ("matching_v3", "sampled_in_student_topk_BT"),
    ],
)
def test_a_support_needs_nothing_of_the_list_that_it_leaves_out(loss: str, absent: str) -> None:
    inputs = case(0).inputs()
    without = dataclasses.replace(inputs, **{absent: None})
    assert torch.equal(DIVERGENCES[loss](without), DIVERGENCES[loss](inputs))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sampled_in_teacher_topk_BT", torch.ones(SHAPE), r"bool of shape \(2, 4\)"),
        ("sampled_in_teacher_topk_BT", torch.ones(2, 3, dtype=torch.bool), r"bool of shape"),
        ("student_topk_in_teacher_topk_BTJ", torch.ones(2, 4, 3, dtype=torch.bool), r"\(2, 4, 4\)"),
        ("response_ids_BT", torch.zeros(SHAPE, dtype=torch.int32), r"int64 of shape \(2, 4\)"),
        ("teacher_entropies_BT", torch.zeros(2, 3), r"has shape \(2, 3\)"),
        ("student_entropies_BT", torch.zeros(SHAPE, requires_grad=True), "must not carry gradient"),
    ],
)
def test_a_misfit_is_refused_by_name(name: str, value: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{reason}"):
        dataclasses.replace(case(0).inputs(), **{name: value})


def test_choices_that_do_not_exist_are_refused_when_written_down() -> None:
    with pytest.raises(ValueError, match="support must be one of teacher_topk, "):
        LocalSupportMatching(support="union")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="support must be one of only_stu, "):
        StudentTopKReverseKL(support="teacher_topk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_mode must be one of student_p, "):
        StudentTopKReverseKL(weight_mode="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_log_ratio is of the renormalised form"):
        LocalSupportMatching(tail=True, clip_log_ratio=5.0)
    with pytest.raises(ValueError, match="beta must be in"):
        GeneralizedJSD(beta=1.0)
    with pytest.raises(ValueError, match="entropy_threshold must be >= 0"):
        EntropyAwareKL(entropy_threshold=-1.0)
