"""Laws of every position weight, over random responses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.losses.objective import merge, needs_normalization, objective, step_scale
from student_trainer.losses.policy_gradients import SampledReverseKL
from student_trainer.losses.weight_choice import (
    BlockGate,
    EntropyTop,
    ImportanceRatio,
    PositionWeight,
    PositionWindow,
    PrefixImportanceWeight,
    PruneWeight,
)
from tests.trainer.made_responses import (
    NEWLINE_ID,
    Response,
    collate,
    random_response,
    random_responses,
)

torch.set_num_threads(1)

law = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)

GAMMA = 0.5
IMPORTANCE: dict[str, PrefixImportanceWeight] = {
    "cumulative": PrefixImportanceWeight(),
    "cumulative clipped": PrefixImportanceWeight(max_gap_nats=0.5),
    "cumulative by sample": PrefixImportanceWeight(normalize="sample_mean"),
    "cumulative by batch": PrefixImportanceWeight(normalize="batch_mean"),
    "signed": PrefixImportanceWeight(kind="signed"),
    "linear": PrefixImportanceWeight(kind="linear"),
    "fixed_prefix": PrefixImportanceWeight(kind="fixed_prefix", prefix_share=0.3),
    "surrogate_only": PrefixImportanceWeight(kind="surrogate_only"),
    "ideal_ratio": PrefixImportanceWeight(kind="ideal_ratio", alpha=0.3),
    "ideal_blend": PrefixImportanceWeight(kind="ideal_blend", alpha=0.3),
    "causal": PrefixImportanceWeight(kind="causal", tau_nats=5.0),
    "causal clipped": PrefixImportanceWeight(kind="causal", tau_nats=5.0, max_gap_nats=1.0),
}
SPANS = {"newline_ids": (NEWLINE_ID,), "min_span": 2, "max_span": 5, "block_size": 3}
WEIGHTS: dict[str, PositionWeight] = {
    "prune": PruneWeight(w_drop=0.1),
    "prune normalized": PruneWeight(w_drop=0.1, normalize=True),
    **IMPORTANCE,
    "first window": PositionWindow(start_share=0.0, end_share=0.3),
    "last window": PositionWindow(start_share=0.7, end_share=1.0),
    "entropy top": EntropyTop(ratio=0.2),
    "block gate": BlockGate(block_size=4),
    "token gate": BlockGate(granularity="token"),
    "sequence gate": BlockGate(granularity="sequence", aggregate="rms"),
    "newline gate": BlockGate(granularity="newline", aggregate="mean_abs", **SPANS),
    "truncated ratio": ImportanceRatio(max_ratio=2.0),
    "masked ratio": ImportanceRatio(mode="mask", min_ratio=0.5, max_ratio=2.0),
    "sequence ratio": ImportanceRatio(granularity="sequence", max_ratio=1.5),
    "masked sequence ratio": ImportanceRatio(
        mode="mask", granularity="sequence", min_ratio=0.8, max_ratio=1.5
    ),
}
RANGES: dict[str, tuple[float, float]] = {
    "prune": (0.5, 1.5),
    "prune normalized": (0.5, 1.5),
    "cumulative by sample": (1 / (1 + GAMMA), 1 + GAMMA),
    "surrogate_only": (0.0, 1.0),
    "ideal_ratio": (math.exp(-20), math.exp(20)),
    "ideal_blend": (1.0, 1.0 + GAMMA * 23),
    "first window": (0.0, 1.0),
    "last window": (0.0, 1.0),
    "entropy top": (0.0, 1.0),
    "block gate": (0.0, 1.0),
    "token gate": (0.0, 1.0),
    "sequence gate": (0.0, 1.0),
    "newline gate": (0.0, 1.0),
    "truncated ratio": (0.0, 2.0),
    "masked ratio": (0.0, 2.0),
    "sequence ratio": (0.0, 1.5),
    "masked sequence ratio": (0.0, 1.5),
}
"""Where it is not [1, 1 + gamma]."""

TOGETHER = ["prune", "causal", "entropy top", "newline gate", "truncated ratio"]
"""In one step, where their product is divided by its mean."""

every_weight = pytest.mark.parametrize("name", WEIGHTS)


def step_gradients(
    micro_batches: list[list[Response]], weights: list[PositionWeight], *, left: bool
) -> tuple[dict[int, Tensor], dict[str, float]]:
    """The scaled gradient of a step by response (its id), and the step's metrics."""
    parts = []
    responses = [response for micro in micro_batches for response in micro]
    for response in responses:
        response.student_T.grad = None
    for micro in micro_batches:
        sums = objective(collate(micro, left=left), divergence=SampledReverseKL(), weights=weights)
        sums.loss_sum.backward()
        parts.append(sums.detached())
    totals, normalize = merge(parts), needs_normalization(weights)
    scale = step_scale(totals.weight_sum.item(), totals.num_tokens.item(), normalize)
    gradients = {}
    for response in responses:
        assert response.student_T.grad is not None
        gradients[id(response)] = scale * response.student_T.grad
    return gradients, totals.metrics(normalize=normalize)


@pytest.mark.parametrize("names", [*([name] for name in WEIGHTS), TOGETHER], ids=", ".join)
@law
@given(seed=seeds, left=st.booleans(), order=st.permutations(range(7)), cut=st.integers(1, 6))
def test_padding_order_and_micro_batches_leave_the_step_unchanged(
    names: list[str], seed: int, left: bool, order: list[int], cut: int
) -> None:
    weights = [WEIGHTS[name] for name in names]
    responses = random_responses(seed)
    shuffled = [responses[index] for index in order]
    whole, metrics = step_gradients([responses], weights, left=False)
    found, found_metrics = step_gradients([shuffled[:cut], shuffled[cut:]], weights, left=left)
    for key, gradient in whole.items():
        assert torch.allclose(found[key], gradient, rtol=1e-6, atol=1e-9)
    assert found_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


@law
@given(seed=seeds)
def test_masked_positions_can_be_deleted(seed: int) -> None:
    for response in random_responses(seed):
        with_holes = collate([response], spare=0)
        without = collate([response.kept(response.mask_T)], spare=0)
        for name, weight in WEIGHTS.items():
            whole, dense = weight(with_holes)[0], weight(without)[0]
            assert torch.allclose(whole[response.mask_T], dense, rtol=1e-6, atol=1e-9), name
            assert (whole[~response.mask_T] == 0.0).all(), name


@law
@given(seed=seeds)
def test_weights_are_detached_finite_and_in_range(seed: int) -> None:
    inputs = collate(random_responses(seed))
    for name, weight in WEIGHTS.items():
        found = weight(inputs)
        low, high = RANGES.get(name, (1.0, 1.0 + GAMMA))
        assert not found.requires_grad, name
        assert found.isfinite().all(), name
        # A few roundings of float32, in which some weights are.
        in_range = (found >= low * (1 - 1e-6)) & (found <= high * (1 + 1e-6))
        assert in_range[inputs.mask_BT].all(), name


@every_weight
@pytest.mark.parametrize(("num_sequences", "length"), [(2, 3), (1, 0), (2, 1)])
def test_nothing_valid_gives_zero_weights(name: str, num_sequences: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    responses = [random_response(generator, length) for _ in range(num_sequences)]
    for response in responses:
        response.mask_T[:] = False
    found = WEIGHTS[name](collate(responses, spare=0))
    assert found.tolist() == [[0.0] * length] * num_sequences
    gradients, metrics = step_gradients([responses], [WEIGHTS[name]], left=False)
    assert metrics == {"loss": 0.0, "loss_tokens": 0.0}
    assert all((gradient == 0.0).all() for gradient in gradients.values())


@every_weight
def test_extreme_log_probs_give_no_nan(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    response = random_response(generator, 6, holes=False)
    response.behavior_T[:] = torch.tensor([-1e4, 0.0, 0.0, -1e-30, -1e4, -80.0])
    response.teacher_T[:] = torch.tensor([0.0, -1e4, 0.0, 0.0, -1e4, -58.0])
    gradients, metrics = step_gradients([[response]], [WEIGHTS[name]], left=False)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("name", "first"),
    [
        *((name, 1 + GAMMA) for name in IMPORTANCE if "sample" not in name and "_" not in name),
        ("cumulative by sample", 1.0),
        ("fixed_prefix", 1 + GAMMA),
        ("surrogate_only", 1.0),
        ("ideal_ratio", 1.0),
        ("ideal_blend", 1 + GAMMA),
        ("first window", 1.0),
        ("last window", 0.0),
        ("entropy top", 1.0),
    ],
)
def test_a_response_of_one_token_has_the_weight_of_a_first_token(name: str, first: float) -> None:
    response = random_response(torch.Generator().manual_seed(3), 1, holes=False)
    found = WEIGHTS[name](collate([response]))
    assert found[0].tolist() == pytest.approx([first, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    "name", [n for n, weight in WEIGHTS.items() if needs_normalization([weight])]
)
@law
@given(seed=seeds)
def test_mean_normalized_weights_average_one_over_the_step(name: str, seed: int) -> None:
    responses = random_responses(seed)
    inputs = collate(responses)
    weight = WEIGHTS[name](inputs)
    gradients, _ = step_gradients([responses[:3], responses[3:]], [WEIGHTS[name]], left=False)
    if weight.sum() == 0.0:
        return
    normalized = weight / weight[inputs.mask_BT].mean()
    plain, _ = step_gradients([responses], [], left=False)
    for row, response in enumerate(responses):
        expected = plain[id(response)] * normalized[row, : len(response.mask_T)]
        assert torch.allclose(gradients[id(response)], expected, rtol=1e-6, atol=1e-9)


def test_which_weights_are_divided_by_their_mean() -> None:
    divided = {name for name, weight in WEIGHTS.items() if needs_normalization([weight])}
    assert divided == {
        "prune normalized",
        "cumulative by batch",
        "ideal_ratio",
        "first window",
        "last window",
        "entropy top",
        "block gate",
        "token gate",
        "sequence gate",
        "newline gate",
    }
    assert not needs_normalization(
        [PrefixImportanceWeight(kind="ideal_ratio", normalize="sample_mean")]
    )
    assert not needs_normalization([])
    assert needs_normalization([PruneWeight(w_drop=0.01), PrefixImportanceWeight()])
    assert needs_normalization([PruneWeight(w_drop=0.01), BlockGate()])


@law
@given(seed=seeds, length=st.integers(1, 20))
def test_causal_weights_do_not_look_ahead(seed: int, length: int) -> None:
    response = random_response(torch.Generator().manual_seed(seed), 20)
    first = torch.arange(20) < length
    for name in ("causal", "causal clipped"):
        whole = WEIGHTS[name](collate([response], spare=0))[0]
        alone = WEIGHTS[name](collate([response.kept(first)], spare=0))[0]
        assert torch.equal(whole[:length], alone)


@law
@given(seed=seeds)
def test_shares_and_causal_weights_never_rise(seed: int) -> None:
    inputs = collate(random_responses(seed))
    rising = {"signed", "ideal_ratio", "ideal_blend"}
    for name in IMPORTANCE.keys() - rising:
        found = IMPORTANCE[name](inputs)
        for row, keep in zip(found, inputs.mask_BT, strict=True):
            assert (row[keep].diff() <= 0.0).all(), name


@law
@given(seed=seeds, gap=st.floats(0.1, 4.0))
def test_equal_gaps_make_the_cumulative_share_linear(seed: int, gap: float) -> None:
    response = random_response(torch.Generator().manual_seed(seed), 12)
    sign = torch.where(torch.arange(12) % 2 == 0, 1.0, -1.0)
    response.teacher_T[:] = response.behavior_T + gap * sign
    inputs = collate([response])
    linear, cumulative = IMPORTANCE["linear"](inputs), IMPORTANCE["cumulative"](inputs)
    assert torch.allclose(linear.double(), cumulative, rtol=1e-6, atol=1e-6)


@law
@given(seed=seeds)
def test_advantages_of_one_sign_make_the_signed_share_the_absolute_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    response = random_response(generator, 12)
    for sign in (1.0, -1.0):
        gaps = sign * (0.1 + torch.rand(12, generator=generator, dtype=torch.float64))
        response.teacher_T[:] = response.behavior_T + gaps
        inputs = collate([response])
        signed, absolute = IMPORTANCE["signed"](inputs), IMPORTANCE["cumulative"](inputs)
        assert torch.allclose(signed, absolute, rtol=1e-6, atol=1e-6)


@law
@given(seed=seeds, share=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]))
def test_windows_that_meet_hold_every_token_once(seed: int, share: float) -> None:
    inputs = collate(random_responses(seed))
    first = PositionWindow(start_share=0.0, end_share=share)(inputs)
    last = PositionWindow(start_share=share, end_share=1.0)(inputs)
    assert torch.equal(first + last, inputs.mask_BT.float())


@law
@given(seed=seeds, ratio=st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.7, 0.9, 1.0]))
def test_entropy_top_keeps_the_asked_number_of_the_highest(seed: int, ratio: float) -> None:
    for response in random_responses(seed):
        inputs = collate([response])
        kept = EntropyTop(ratio=ratio)(inputs)[0] > 0
        num_valid = int(response.mask_T.sum())
        assert inputs.student_entropies_BT is not None
        entropies = inputs.student_entropies_BT[0]
        if num_valid:
            # Exact for these ratios: 100 * ratio is an integer.
            asked = max(1, round(100 * ratio) * num_valid // 100)
            lowest = entropies[inputs.mask_BT[0]].sort(descending=True).values[asked - 1]
            tied = int((entropies[inputs.mask_BT[0]] == lowest).sum())
            assert asked <= int(kept.sum()) < asked + tied
        rest = inputs.mask_BT[0] & ~kept
        if kept.any() and rest.any():
            assert entropies[kept].min() >= entropies[rest].max()


@law
@given(seed=seeds)
def test_gates_and_ratios_are_one_on_policy(seed: int) -> None:
    responses = random_responses(seed)
    for response in responses:
        response.behavior_T[:] = response.student_T.detach()
    inputs = collate(responses)
    for name, weight in WEIGHTS.items():
        if isinstance(weight, BlockGate | ImportanceRatio):
            assert torch.equal(weight(inputs), inputs.mask_BT.double()), name
