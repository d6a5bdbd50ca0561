"""Sums, normalisation, refusals and degenerate masks."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from student_trainer.losses import Candidates, LossInputs
from student_trainer.losses.divergences import (
    GeneralizedJSD,
    LocalSupportMatching,
)
from student_trainer.losses.entropy_aware import EntropyAwareKL
from student_trainer.losses.laws import inputs_of
from student_trainer.losses.objective import (
    Divergence,
    merge,
    needs_normalization,
    objective,
    step_scale,
)
from student_trainer.losses.policy_gradients import SampledReverseKL, StudentTopKReverseKL
from student_trainer.losses.weight_choice import (
    BlockGate,
    PositionWeight,
    PrefixImportanceWeight,
    PruneWeight,
)
from tests.trainer.losses.loss_cases import DIVERGENCES, mean_normalized

torch.set_num_threads(1)

ALL_WEIGHTS = [PruneWeight(w_drop=0.01), PrefixImportanceWeight(), BlockGate(block_size=2)]


def random_inputs(num_sequences: int, num_tokens: int, seed: int = 0) -> LossInputs:
    """A full micro-batch over a vocabulary of 6, K = J = 3, student near but off the behaviour."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_sequences, num_tokens, 6)
    behavior, teacher, step = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    student = (behavior + 0.3 * step).requires_grad_().log_softmax(-1)
    behavior, teacher = behavior.log_softmax(-1), teacher.log_softmax(-1)
    return inputs_of(
        student,
        behavior,
        teacher,
        torch.randint(6, shape[:2], generator=generator),
        teacher_ids_BTK=teacher.topk(3).indices,
        student_ids_BTJ=behavior.topk(3).indices,
        mask_BT=torch.ones(shape[:2], dtype=torch.bool),
        bad_events_BT=torch.rand(shape[:2], generator=generator) < 0.5,
    )


def two_tokens(**changes: torch.Tensor) -> LossInputs:
    """Sampled log-probs only: advantages -1 and 2, on policy."""
    behavior = torch.tensor([[-1.0, -3.0]])
    tensors = {
        "mask_BT": torch.tensor([[True, True]]),
        "behavior_logprobs_BT": behavior,
        "student_logprobs_BT": behavior.clone().requires_grad_(),
        "teacher_logprobs_BT": torch.tensor([[-2.0, -1.0]]),
        **changes,
    }
    listed = {
        f"{whose}_logprobs_BTN": tensors.pop(f"{whose}_logprobs_BT").unsqueeze(-1)
        for whose in ("student", "teacher", "behavior")
    }
    return LossInputs(sampled=Candidates(**listed), **tensors)


def test_sums_and_metrics_of_a_worked_example() -> None:
    bad_events = torch.tensor([[False, True]])
    inputs = two_tokens(bad_events_BT=bad_events)
    sums = objective(
        inputs, divergence=SampledReverseKL(), weights=[PruneWeight(w_drop=1.0, w_base=0.5)]
    )
    assert sums.loss_sum.item() == pytest.approx(1.5 * 1.0 + 0.5 * -2.0)
    assert sums.metrics(normalize=False) == pytest.approx(
        {
            "loss": 0.25,
            "loss_tokens": 2.0,
            "weight_mean": 1.0,
            "weight_min": 0.5,
            "weight_max": 1.5,
            "reverse_kl": -0.5,
        }
    )


def test_masked_positions_do_not_enter_the_extremes_of_the_weights() -> None:
    inputs = two_tokens(mask_BT=torch.tensor([[False, True]]))
    weights = [PrefixImportanceWeight(gamma=0.5)]
    found = objective(inputs, divergence=SampledReverseKL(), weights=weights)
    assert found.weight_min.item() == found.weight_max.item() == 1.5
    low = objective(inputs, divergence=SampledReverseKL(), weights=[BlockGate()])
    assert low.weight_min.item() == low.weight_max.item() == 1.0


def test_gradient_of_the_worked_example_is_minus_weight_times_advantage() -> None:
    student = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    inputs = two_tokens(student_logprobs_BT=student)
    objective(
        inputs, divergence=SampledReverseKL(), weights=[PrefixImportanceWeight(gamma=0.5)]
    ).loss_sum.backward()
    second = 1 + 0.5 * (1 - 1 / 3)
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([1.5 * 1.0, second * -2.0])


def test_masses_on_both_supports_are_reported() -> None:
    inputs = random_inputs(2, 3)
    found = objective(inputs, divergence=LocalSupportMatching()).metrics(normalize=False)
    teachers, students = inputs.teacher_topk, inputs.student_topk
    assert teachers is not None
    assert students is not None
    for name, logprobs in (
        ("student_mass_at_teacher_topk", teachers.student_logprobs_BTN),
        ("teacher_mass_at_teacher_topk", teachers.teacher_logprobs_BTN),
        ("behavior_mass_at_student_topk", students.behavior_logprobs_BTN),
        ("teacher_mass_at_student_topk", students.teacher_logprobs_BTN),
    ):
        assert logprobs is not None
        assert found[name] == pytest.approx(logprobs.exp().sum(-1).mean().item())


def test_scaled_gate_gradient_is_the_papers_equation_four() -> None:
    inputs = random_inputs(3, 5)
    gate = BlockGate(block_size=2)
    sums = objective(inputs, divergence=LocalSupportMatching(), weights=[gate])
    scale = step_scale(sums.weight_sum.item(), sums.num_tokens.item(), needs_normalization([gate]))
    normalized_BT = mean_normalized(gate(inputs), inputs.mask_BT)
    expected = (normalized_BT * LocalSupportMatching()(inputs)).sum() / inputs.mask_BT.sum()
    assert (sums.loss_sum * scale).item() == pytest.approx(expected.item(), rel=1e-12)
    assert sums.metrics(normalize=True)["loss"] == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("divergence", [LocalSupportMatching(), StudentTopKReverseKL()])
@pytest.mark.parametrize("weights", [[], [BlockGate(block_size=2)]])
def test_on_policy_step_at_full_support_is_the_gradient_of_the_mean_exact_divergence(
    divergence: Divergence, weights: list[PositionWeight]
) -> None:
    generator = torch.Generator().manual_seed(5)
    logits, teacher = torch.randn(2, 1, 3, 6, generator=generator, dtype=torch.float64).unbind()
    student, teacher = logits.requires_grad_().log_softmax(-1), teacher.log_softmax(-1)
    everything = torch.arange(6).expand(1, 3, 6)
    inputs = inputs_of(
        student,
        student.detach(),
        teacher,
        torch.zeros(1, 3, dtype=torch.long),
        teacher_ids_BTK=everything,
        student_ids_BTJ=everything,
        mask_BT=torch.ones(1, 3, dtype=torch.bool),
    )
    exact = (student.exp() * (student - teacher)).sum(-1).mean()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    sums = objective(inputs, divergence=divergence, weights=weights)
    scale = step_scale(sums.weight_sum.item(), sums.num_tokens.item(), needs_normalization(weights))
    (found,) = torch.autograd.grad(sums.loss_sum, logits)
    assert torch.allclose(found * scale, expected, rtol=1e-10, atol=1e-12)


def test_step_scale_divides_by_weights_or_by_tokens() -> None:
    assert step_scale(5.0, 4.0, False) == 0.25
    assert step_scale(5.0, 4.0, True) == 0.2
    assert step_scale(0.0, 4.0, True) == 0.0
    assert step_scale(0.0, 0.0, False) == 0.0
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight_sum_total must be finite"):
            step_scale(bad, 1.0, True)


def test_weights_multiply() -> None:
    inputs = random_inputs(2, 4)
    weight_BT = torch.stack([weight(inputs).double() for weight in ALL_WEIGHTS]).prod(0)
    loss_BT = LocalSupportMatching()(inputs)
    sums = objective(inputs, divergence=LocalSupportMatching(), weights=ALL_WEIGHTS)
    assert sums.loss_sum.item() == pytest.approx((weight_BT * loss_BT).sum().item(), rel=1e-12)
    assert sums.weight_sum.item() == pytest.approx(weight_BT.sum().item(), rel=1e-12)


def test_any_function_of_the_inputs_is_a_divergence() -> None:
    found = objective(random_inputs(2, 3), divergence=lambda inputs: inputs.student_logprobs_BT)
    assert found.loss_sum.requires_grad
    holes = two_tokens(mask_BT=torch.tensor([[True, False]]))
    found = objective(holes, divergence=lambda inputs: torch.where(inputs.mask_BT, 2.0, math.nan))
    assert found.loss_sum.item() == 2.0
    with pytest.raises(ValueError, match=r"the divergence returned \(\)"):
        objective(random_inputs(2, 3), divergence=lambda inputs: inputs.student_logprobs_BT.sum())


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize(("num_sequences", "num_tokens"), [(2, 3), (1, 1), (2, 0), (0, 3)])
def test_nothing_valid_gives_a_zero_loss_and_zero_gradient(
    divergence: Divergence, num_sequences: int, num_tokens: int
) -> None:
    full = random_inputs(num_sequences, num_tokens)
    student = torch.zeros(num_sequences, num_tokens, 1, requires_grad=True)
    wide = torch.zeros(num_sequences, num_tokens, 3, requires_grad=True)
    leaves = {"sampled": student, "teacher_topk": wide, "student_topk": wide}
    lists = {
        name: dataclasses.replace(getattr(full, name), student_logprobs_BTN=leaf.double())
        for name, leaf in leaves.items()
    }
    inputs = dataclasses.replace(full, mask_BT=torch.zeros_like(full.mask_BT), **lists)
    sums = objective(inputs, divergence=divergence, weights=ALL_WEIGHTS)
    sums.loss_sum.backward()
    for leaf in (student, wide):
        assert leaf.grad is None or leaf.grad.abs().sum().item() == 0.0
    assert sums.loss_sum.item() == 0.0
    assert sums.metrics(normalize=True) == {"loss": 0.0, "loss_tokens": 0.0}


def test_all_zero_weights_give_zero_not_nan() -> None:
    everything_bad = torch.ones(1, 2, dtype=torch.bool)
    sums = objective(
        two_tokens(bad_events_BT=everything_bad),
        divergence=SampledReverseKL(),
        weights=[PruneWeight(w_drop=1.0, w_base=0.0), BlockGate()],
    )
    assert sums.metrics(normalize=True)["loss"] == 0.0
    assert step_scale(sums.weight_sum.item(), sums.num_tokens.item(), True) == 0.0


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_a_rollout_of_one_token_has_the_weights_of_a_first_token(divergence: Divergence) -> None:
    inputs = dataclasses.replace(random_inputs(1, 1), bad_events_BT=torch.tensor([[False]]))
    weights = [PruneWeight(w_drop=0.01, w_base=0.5), PrefixImportanceWeight(gamma=0.5)]
    sums = objective(inputs, divergence=divergence, weights=weights)
    assert sums.weight_sum.item() == pytest.approx(1.5 * 1.5)
    assert sums.loss_sum.item() == pytest.approx(2.25 * divergence(inputs).item())


def rows_of(inputs: Any, rows: slice) -> Any:
    """Some sequences of the inputs, or of one of their lists."""
    values = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return type(inputs)(
        **{
            name: value[rows] if isinstance(value, torch.Tensor) else value and rows_of(value, rows)
            for name, value in values.items()
        }
    )


def test_merged_parts_equal_the_whole() -> None:
    whole = random_inputs(4, 3)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = objective(
            rows_of(whole, rows), divergence=LocalSupportMatching(), weights=ALL_WEIGHTS
        )
        parts.append(part.detached())
    merged = merge(parts)
    expected = objective(whole, divergence=LocalSupportMatching(), weights=ALL_WEIGHTS)
    assert not merged.loss_sum.requires_grad
    assert merged.metrics(normalize=True) == pytest.approx(expected.metrics(normalize=True))
    with pytest.raises(ValueError, match="one set of monitors"):
        merge([parts[0], objective(two_tokens(), divergence=SampledReverseKL())])


def test_prune_without_events_names_the_drift_policy() -> None:
    with pytest.raises(ValueError, match=r"bad_events_BT is needed and absent: .*drift policy"):
        objective(two_tokens(), divergence=SampledReverseKL(), weights=[PruneWeight(w_drop=0.01)])


@pytest.mark.parametrize("hole", [math.nan, -math.inf])
def test_a_missing_teacher_value_is_refused_only_where_it_counts(hole: float) -> None:
    teacher = torch.tensor([[-2.0, hole]])
    with pytest.raises(
        ValueError, match=r"sampled.teacher_logprobs_BTN is missing .* at 1 valid positions"
    ):
        two_tokens(teacher_logprobs_BT=teacher)
    student = torch.tensor([[-1.0, hole]], requires_grad=True)
    inputs = two_tokens(
        mask_BT=torch.tensor([[True, False]]),
        teacher_logprobs_BT=teacher,
        student_logprobs_BT=student,
    )
    sums = objective(inputs, divergence=SampledReverseKL(), weights=[BlockGate()])
    sums.loss_sum.backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[1.0, 0.0]]
    assert sums.num_tokens.item() == 1.0


def behaving(candidates: Candidates) -> Candidates:
    return dataclasses.replace(
        candidates, behavior_logprobs_BTN=candidates.teacher_logprobs_BTN.clone()
    )


def test_misaligned_inputs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"sampled.teacher_logprobs_BTN has shape \(1, 1, 1\)"):
        two_tokens(teacher_logprobs_BT=torch.tensor([[-1.0]]))
    with pytest.raises(ValueError, match="mask_BT must be bool"):
        two_tokens(mask_BT=torch.ones(1, 2))
    with pytest.raises(ValueError, match="bad_events_BT must be bool"):
        two_tokens(bad_events_BT=torch.zeros(1, 2))
    wide = Candidates(
        student_logprobs_BTN=torch.zeros(2, 2, 3), teacher_logprobs_BTN=torch.zeros(2, 2, 3)
    )
    with pytest.raises(ValueError, match=r"teacher_topk\.\w+ has shape \(2, 2, 3\)"):
        dataclasses.replace(two_tokens(), teacher_topk=wide)
    with pytest.raises(ValueError, match="sampled is one token a position"):
        LossInputs(mask_BT=torch.ones(2, 2, dtype=torch.bool), sampled=behaving(wide))
    with pytest.raises(ValueError, match=r"sampled\.behavior_logprobs_BTN is needed"):
        LossInputs(mask_BT=torch.ones(2, 2, dtype=torch.bool), sampled=wide)
    with pytest.raises(ValueError, match=r"sampled\.teacher_logprobs_BTN must not"):
        two_tokens(teacher_logprobs_BT=torch.tensor([[-1.0, -1.0]], requires_grad=True))


@pytest.mark.parametrize(
    ("make", "setting", "value"),
    [
        (lambda: SampledReverseKL(clip_epsilon=2.0), "clip_epsilon", r"less than 1 .*2\.0"),
        (lambda: SampledReverseKL(clip_epsilon=0.0), "clip_epsilon", r"greater than 0 .*0\.0"),
        (lambda: SampledReverseKL(clip_epsilon=1.0), "clip_epsilon", r"less than 1 .*1\.0"),
        (lambda: SampledReverseKL(clip_epsilon=math.nan), "clip_epsilon", "finite number .*nan"),
        (lambda: SampledReverseKL(dual_clip=1.0), "dual_clip", r"greater than 1 .*1\.0"),
        (lambda: StudentTopKReverseKL(dual_clip=0.5), "dual_clip", r"greater than 1 .*0\.5"),
        (lambda: LocalSupportMatching(clip_log_ratio=-5.0), "clip_log_ratio", r"than 0 .*-5\.0"),
        (lambda: LocalSupportMatching(clip_log_ratio=0.0), "clip_log_ratio", r"than 0 .*0\.0"),
        (lambda: LocalSupportMatching(support="union"), "support", "'teacher_topk', .*'union'"),
        (lambda: StudentTopKReverseKL(support="teacher_topk"), "support", "'only_stu', .*topk"),
        (lambda: StudentTopKReverseKL(weight_mode="none"), "weight_mode", "'student_p', .*none"),
        (lambda: GeneralizedJSD(beta=1.0), "beta", r"less than 1 .*1\.0"),
        (lambda: GeneralizedJSD(beta=0.0), "beta", r"greater than 0 .*0\.0"),
        (lambda: GeneralizedJSD(beta=-0.5), "beta", r"greater than 0 .*-0\.5"),
        (lambda: GeneralizedJSD(beta=math.nan), "beta", "finite number .*nan"),
        (lambda: EntropyAwareKL(entropy_threshold=-1.0), "entropy_threshold", r"to 0 .*-1\.0"),
        (lambda: EntropyAwareKL(entropy_threshold=math.nan), "entropy_threshold", "finite.*nan"),
        (lambda: PrefixImportanceWeight(gamma=-0.5), "gamma", r"equal to 0 .*-0\.5"),
        (lambda: PruneWeight(w_drop=0.1, w_base=-0.1), "w_base", r"equal to 0 .*-0\.1"),
        (lambda: BlockGate(tau=-1.0), "tau", r"greater than 0 .*-1\.0"),
    ],
)
def test_a_constant_out_of_range_is_refused_with_its_name_value_and_range(
    make: Callable[[], object], setting: str, value: str
) -> None:
    with pytest.raises(ValidationError, match=rf"\n{setting}\n  .*{value}"):
        make()
