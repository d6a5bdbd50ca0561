"""Values of the position weights at chosen points: pytest tests/trainer/losses/test_weights.py"""

import numpy as np
import pytest
import torch

from student_trainer.losses.prefix_weights import prefix_importance_weights, sampled_advantages
from student_trainer.losses.weights import (
    combine,
    prune_weights,
    reliability,
    sample_mean_normalize,
)
from teacher_wire import drift
from tests.trainer.losses.loss_cases import block_gates, mean_normalized

torch.set_num_threads(1)

OVERLAPS = [1, 0.75, 0.5, 0.75, 0.5, 0.25, 1, 0.5, 0.75]
DRIFT = [0.1, -0.3, 0.5, 0.7, -0.2]
BPDG = {"block_size": 64, "tau": 1.0, "aggregate": "signed_mean"}


def row(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


def mask(pattern: str) -> torch.Tensor:
    """One sequence; x counts, . does not."""
    return torch.tensor([[letter == "x" for letter in pattern]], dtype=torch.bool)


def test_prune_reproduces_the_golden_trajectory() -> None:
    bad_events = row(*OVERLAPS) < 0.7
    everything = mask("x" * 9)
    expected = [1, 1, 0.75, 0.75, 0.5, 0.25, 0.25, 0, 0]
    assert reliability(bad_events, everything, w_drop=0.25).tolist() == [expected]
    weights = prune_weights(bad_events, everything, w_drop=0.25, w_base=0.5)
    assert weights.tolist() == [[value + 0.5 for value in expected]]


@pytest.mark.parametrize("num_events", [1, 3, 7, 49, 100, 103, 1000])
def test_reliability_reaches_exactly_zero_at_the_last_event(num_events: int) -> None:
    bad_events = torch.ones(1, num_events + 1, dtype=torch.bool)
    found = reliability(bad_events, bad_events, w_drop=1.0 / num_events)[0]
    assert (found[: num_events - 1] > 0).all()
    assert found[num_events - 1 :].tolist() == [0.0, 0.0]


def test_the_published_drop_hits_zero_at_the_hundredth_event() -> None:
    bad_events = torch.ones(1, 101, dtype=torch.bool)
    found = reliability(bad_events, bad_events, w_drop=0.01)[0].tolist()
    assert found[98] == pytest.approx(0.01)
    assert found[99:] == [0.0, 0.0]
    clean = prune_weights(~bad_events, bad_events, w_drop=0.01, w_base=0.5)
    assert clean.tolist() == [[1.5] * 101]


@pytest.mark.parametrize(
    "w_drop", [0.01, 0.05, 0.07, 0.1, 0.25, 0.3, 1 / 3, 1 / 7, 1 / 49, 0.999, 1.0, 1e-9, 1e-3]
)
def test_reliability_has_the_bits_of_the_servers(w_drop: float) -> None:
    """One table for both: the server's float64, rounded once to the float32 of a weight."""
    bad = np.random.default_rng(0).random(400) < 0.6
    events = torch.from_numpy(bad)[None]
    of_server = drift.reliability(w_drop, bad).astype(np.float32)
    of_losses = reliability(events, torch.ones_like(events), w_drop=w_drop)[0].numpy()
    np.testing.assert_array_equal(of_losses.view(np.int32), of_server.view(np.int32))


def test_reliability_is_nought_at_the_event_at_which_the_server_stops() -> None:
    """1 - 3 / 3 in doubles is 0, 1 - 10 * 0.1 is not: both ends ask the same table."""
    for w_drop in (0.01, 0.05, 0.1, 0.3, 1 / 3, 1 / 49, 1e-3):
        budget = drift.bad_event_budget(w_drop)
        events = torch.ones(1, budget, dtype=torch.bool)
        found = reliability(events, events, w_drop=w_drop)[0]
        assert found[-1] == 0.0
        assert (found[:-1] > 0.0).all()


def test_masked_events_do_not_count_and_masked_weights_are_zero() -> None:
    bad_events = torch.ones(1, 5, dtype=torch.bool)
    found = prune_weights(bad_events, mask(".x.x."), w_drop=0.25, w_base=0.5)
    assert found.tolist() == [[0.0, 1.25, 0.0, 1.0, 0.0]]


def test_importance_reproduces_the_golden_weights() -> None:
    teacher, student = row(-0.1, -2.0, -0.5, -3.0), row(-0.2, -0.5, -0.7, -0.5)
    found = prefix_importance_weights(
        sampled_advantages(teacher, student, mask("xxxx")), mask("xxxx"), gamma=0.5
    )
    assert found[0].tolist() == pytest.approx([1.5, 1.488372, 1.313953, 1.290698], abs=1e-6)
    advantage = found * (teacher - student)
    assert advantage[0].tolist() == pytest.approx([0.15, -2.232558, 0.262791, -3.226744], abs=1e-6)


def test_importance_is_one_plus_gamma_where_models_agree() -> None:
    same = row(-1.0, -2.0)
    found = prefix_importance_weights(
        sampled_advantages(same, same, mask("xx")), mask("xx"), gamma=0.5
    )
    assert found.tolist() == [[1.5, 1.5]]


def test_gates_reproduce_the_golden_block() -> None:
    behavior = row(-1.0, -1.0, -1.0, -1.0, -1.0)
    settings = {**BPDG, "block_size": 2}
    gates = block_gates(behavior + row(*DRIFT), behavior, mask("xxxxx"), **settings)
    expected = [0.904837, 0.904837, 0.548812, 0.548812, 0.818731]
    assert gates[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert gates.mean().item() == pytest.approx(0.745206, abs=1e-6)
    normalized = mean_normalized(gates, mask("xxxxx"))[0].tolist()
    expected = [1.214211, 1.214211, 0.736457, 0.736457, 1.098664]
    assert normalized == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("aggregate", "shift"), [("signed_mean", 0.1), ("mean_abs", 0.2), ("rms", 0.05**0.5)]
)
def test_aggregates_treat_opposite_shifts_differently(aggregate: str, shift: float) -> None:
    behavior = row(-1.0, -1.0)
    settings = {"block_size": 2, "tau": 2.0, "aggregate": aggregate}
    gates = block_gates(behavior + row(0.1, -0.3), behavior, mask("xx"), **settings)
    expected = torch.tensor(-2.0 * shift, dtype=torch.float64).exp().item()
    assert gates[0].tolist() == pytest.approx([expected, expected])


def test_a_masked_token_takes_no_place_in_a_block() -> None:
    behavior = row(0.0, -1.0, 0.0, -1.0, -1.0)
    drift = row(0.0, 0.2, 0.0, 0.4, 0.7)
    settings = {**BPDG, "block_size": 2}
    gates = block_gates(behavior + drift, behavior, mask(".x.xx"), **settings)[0]
    assert (-gates[[1, 3, 4]].log()).tolist() == pytest.approx([0.3, 0.3, 0.7])
    assert gates[[0, 2]].tolist() == [0.0, 0.0]


def test_combine_is_the_detached_product() -> None:
    product = combine(row(1.5, 0.5, grad=True), row(2.0, 3.0))
    assert product.tolist() == [[3.0, 1.5]]
    assert not product.requires_grad
    with pytest.raises(ValueError, match="at least one"):
        combine()
    with pytest.raises(ValueError, match="shapes"):
        combine(row(1.0), row(1.0, 2.0))


def test_normalizing_ignores_masked_positions_and_keeps_zeros() -> None:
    found = sample_mean_normalize(row(9.0, 1.0, 3.0), mask(".xx"))
    assert found.tolist() == [[0.0, 0.5, 1.5]]
    assert sample_mean_normalize(row(0.0, 0.0), mask("xx")).tolist() == [[0.0, 0.0]]
    assert sample_mean_normalize(row(1.0, 2.0), mask("..")).tolist() == [[0.0, 0.0]]


def test_inputs_that_do_not_fit_are_refused() -> None:
    valid, values = mask("xx"), row(-1.0, -1.0)
    with pytest.raises(ValueError, match="bad_events_BT must be bool"):
        reliability(values, valid, w_drop=0.1)
    with pytest.raises(ValueError, match="mask_BT must be bool"):
        sample_mean_normalize(values, valid.double())
    with pytest.raises(ValueError, match="behavior_logprobs_BT must not carry gradient"):
        block_gates(values, values.clone().requires_grad_(), valid, **BPDG)
