"""The head in two passes against all logits at once: pytest tests/trainer/learner/test_head.py

Gradients to 1e-5 of the largest: float32, the same sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.learner import logit_blocks
from student_trainer.learner.head import Head, LogitTransform
from student_trainer.learner.head_logprobs import head_logprobs, reference_logprobs
from teacher_wire.id_ranges import IdRanges, inside

LIMIT = 1e-5
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.25),
    "capped": LogitTransform(soft_cap=3.0),
    "both": LogitTransform(scale=2.0, soft_cap=5.0),
}
Way = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows and vocabulary are several blocks, the last of each narrower."""
    torch.set_num_threads(1)
    monkeypatch.setitem(logit_blocks.BLOCK, "cpu", (16, 32))


def made(num_rows: int = 50, vocab_size: int = 77, num_ids: int = 9) -> dict[str, Tensor]:
    """Weight, bias, hidden states, ids with repeats within a row, and what the loss weighs."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (num_rows, num_ids), generator=draw)
    ids[:, -1] = ids[:, 0]
    return {
        "weight": torch.randn(vocab_size, 24, generator=draw) * 0.5,
        "bias": torch.randn(vocab_size, generator=draw),
        "hidden": torch.randn(num_rows, 24, generator=draw),
        "ids": ids,
        "factor": torch.randn(num_rows, num_ids, generator=draw),
    }


def found(way: Way, tensors: dict[str, Tensor], head: dict[str, Any], **options: Any) -> Any:
    """Log-probs, entropies and the three gradients."""
    weight, bias, hidden = (
        tensors[name].clone().requires_grad_() for name in ("weight", "bias", "hidden")
    )
    logprobs, entropies = way(
        Head(weight_VD=weight, bias_V=bias, **head), hidden, tensors["ids"], **options
    )
    (logprobs * tensors["factor"]).sum().backward()
    return [logprobs.detach(), entropies, hidden.grad, weight.grad, bias.grad]


def assert_close(left: list[Tensor], right: list[Tensor], limit: float = LIMIT) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= limit * other.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_two_passes_equal_all_logits_at_once(transform: LogitTransform, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature}
    ours = found(head_logprobs, made(), {"transform": transform}, **options)
    assert_close(ours, found(reference_logprobs, made(), {"transform": transform}, **options))


@settings(deadline=None, max_examples=20)
@given(
    num_rows=st.integers(0, 40),
    vocab_size=st.integers(2, 100),
    num_ids=st.integers(0, 5),
)
def test_any_shape_equals_all_logits_at_once(num_rows: int, vocab_size: int, num_ids: int) -> None:
    draw = torch.Generator().manual_seed(num_rows)
    tensors = made(50, vocab_size, 9) | {
        "hidden": torch.randn(num_rows, 24, generator=draw),
        "ids": torch.randint(vocab_size, (num_rows, num_ids), generator=draw),
        "factor": torch.randn(num_rows, num_ids, generator=draw),
    }
    for one, other in zip(
        found(head_logprobs, tensors, {}), found(reference_logprobs, tensors, {}), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_products_in_bfloat16_round_their_operands_alone() -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    ours = found(head_logprobs, made(), {}, **options)
    reference = found(reference_logprobs, made(), {}, **options)
    assert_close(ours[:2], reference[:2])
    # The reference's gradients pass the rounding itself, 8 bits.
    assert_close(ours[2:], reference[2:], 2**-7)
    exact = found(reference_logprobs, made(), {})
    assert not torch.allclose(ours[0], exact[0], atol=1e-4)
    assert all(tensor.dtype == torch.float32 for tensor in ours)


def test_hidden_states_of_16_bits_get_gradients_of_16_bits() -> None:
    tensors = made()
    hidden = tensors["hidden"].bfloat16().requires_grad_()
    weight = tensors["weight"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = head_logprobs(
            Head(weight_VD=weight), hidden, tensors["ids"], dtype=torch.bfloat16
        )
    (logprobs * tensors["factor"]).sum().backward()
    assert logprobs.dtype == weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_a_logit_of_minus_infinity_takes_no_part() -> None:
    tensors = made()
    tensors["bias"][[3, 40]] = -torch.inf
    tensors["ids"] = tensors["ids"].clamp(min=4) % 40 + 0  # none of the two is asked for
    tensors["ids"][tensors["ids"] == 3] = 5
    ours = found(head_logprobs, tensors, {})
    assert all(tensor.isfinite().all() for tensor in ours)
    assert_close(ours, found(reference_logprobs, tensors, {}))
    weight, bias, hidden = (tensors[name] for name in ("weight", "bias", "hidden"))
    asked = torch.full((len(hidden), 1), 40)
    logprobs, _ = head_logprobs(Head(weight_VD=weight, bias_V=bias), hidden, asked)
    assert (logprobs == -torch.inf).all()


EXCLUDED: dict[str, IdRanges] = {
    "tail": ((70, 77),),
    "whole blocks": ((0, 32), (60, 77)),
    "scattered": ((0, 1), (31, 34), (50, 51)),
    "beyond": ((64, 400),),
}
"""Blocks are of 32 ids; there are 77."""


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("excluded", EXCLUDED.values(), ids=EXCLUDED)
def test_ids_that_take_no_part_are_as_rows_that_are_not_there(
    excluded: IdRanges, transform: LogitTransform
) -> None:
    kept = torch.from_numpy(~inside(excluded, np.arange(77))).nonzero()[:, 0]
    tensors = made()
    asked = tensors["ids"] % len(kept)
    whole = tensors | {"ids": kept[asked]}
    cut = tensors | {"ids": asked, "weight": tensors["weight"][kept], "bias": tensors["bias"][kept]}
    head: dict[str, Any] = {"transform": transform, "excluded_ids": excluded}
    ours = found(head_logprobs, whole, head, temperature=0.7)
    expected = found(reference_logprobs, cut, {"transform": transform}, temperature=0.7)
    assert_close([*ours[:3], ours[3][kept], ours[4][kept]], expected)
    left_out = torch.from_numpy(inside(excluded, np.arange(77)))
    for gradient in ours[3:]:
        assert (gradient[left_out] == 0).all()
    assert_close(ours, found(reference_logprobs, whole, head, temperature=0.7))


@pytest.mark.parametrize("way", [head_logprobs, reference_logprobs])
def test_an_id_that_takes_no_part_has_no_probability_and_no_gradient(way: Way) -> None:
    tensors = made()
    tensors["ids"][:, 0] = 5
    tensors["factor"][:, 0] = 0.0
    weight = tensors["weight"].clone().requires_grad_()
    # A logit so large that nothing is left of the others, were it not left out.
    weight.data[5] *= 1000
    head = Head(weight_VD=weight, excluded_ids=((5, 6),))
    logprobs, entropies = way(head, tensors["hidden"], tensors["ids"])
    assert (logprobs[:, 0] == -torch.inf).all()
    assert (entropies > 0.5).all()
    (logprobs[:, 1:] * tensors["factor"][:, 1:]).sum().backward()
    assert weight.grad is not None
    assert (weight.grad[5] == 0).all()
    assert weight.grad.isfinite().all()


def test_entropy_has_no_gradient() -> None:
    tensors = made()
    hidden = tensors["hidden"].requires_grad_()
    _, entropies = head_logprobs(Head(weight_VD=tensors["weight"]), hidden, tensors["ids"])
    assert not entropies.requires_grad


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(frozen: str) -> None:
    tensors = made()
    leaves = {
        name: tensors[name].clone().requires_grad_(name != frozen)
        for name in ("weight", "bias", "hidden")
    }
    head = Head(weight_VD=leaves["weight"], bias_V=leaves["bias"])
    logprobs, _ = head_logprobs(head, leaves["hidden"], tensors["ids"])
    (logprobs * tensors["factor"]).sum().backward()
    expected = dict(
        zip(("hidden", "weight", "bias"), found(reference_logprobs, made(), {})[2:], strict=True)
    )
    assert leaves[frozen].grad is None
    for name in expected.keys() - {frozen}:
        assert_close([leaves[name].grad], [expected[name]])  # type: ignore[list-item]


def test_gradients_of_several_passes_add_up_in_the_tensor_that_is_there() -> None:
    tensors = made()
    weight = tensors["weight"].clone().requires_grad_()
    weight.grad = start = torch.ones_like(weight)
    for _ in range(2):
        logprobs, _ = head_logprobs(Head(weight_VD=weight), tensors["hidden"], tensors["ids"])
        (logprobs * tensors["factor"]).sum().backward()
    assert weight.grad is start
    plain = tensors["weight"].clone().requires_grad_()
    logprobs, _ = reference_logprobs(Head(weight_VD=plain), tensors["hidden"], tensors["ids"])
    (2 * logprobs * tensors["factor"]).sum().backward()
    assert_close([weight.grad - 1], [plain.grad])  # type: ignore[list-item]


def test_a_tied_embedding_gets_both_gradients() -> None:
    tensors = made()
    inputs = torch.randint(77, (50,), generator=torch.Generator().manual_seed(5))

    def gradient(way: Way) -> Tensor:
        weight = tensors["weight"].clone().requires_grad_()
        hidden = torch.nn.functional.embedding(inputs, weight).tanh()
        logprobs, _ = way(Head(weight_VD=weight), hidden, tensors["ids"])
        (logprobs * tensors["factor"]).sum().backward()
        assert weight.grad is not None
        return weight.grad

    assert_close([gradient(head_logprobs)], [gradient(reference_logprobs)])


def renormalised(way: Way, tensors: dict[str, Tensor], head: dict[str, Any]) -> list[Tensor]:
    """Gradients of a loss that is renormalised on its ids in every second row, which is what Local
    Support Matching is; of every fourth row nothing is wanted."""
    weight, bias, hidden = (
        tensors[name].clone().requires_grad_() for name in ("weight", "bias", "hidden")
    )
    made_head = Head(weight_VD=weight, bias_V=bias, **head)
    logprobs, _ = way(made_head, hidden, tensors["ids"], temperature=0.7)
    kept = logprobs.masked_fill(logprobs.isinf(), -50.0)
    kept = torch.stack([kept[::2].log_softmax(-1), kept[1::2]], 1).flatten(0, 1)
    weights = tensors["factor"].clone()
    weights[::4] = 0.0
    (kept * weights).sum().backward()
    return [leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None]


@pytest.mark.parametrize("excluded", [(), ((0, 7), (40, 41))], ids=["every_id", "some_ids"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_loss_renormalised_on_its_ids_has_the_gradient_of_all_logits(
    transform: LogitTransform, excluded: IdRanges
) -> None:
    head = {"transform": transform, "excluded_ids": excluded}
    ours = renormalised(head_logprobs, made(), head)
    assert_close(ours, renormalised(reference_logprobs, made(), head))


@pytest.mark.parametrize(("balanced", "expected"), [(True, 0), (False, 50)])
def test_only_rows_with_a_gradient_of_every_logit_are_made_again(
    balanced: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    plain = logit_blocks.LogitBlocks.second_pass

    def counted(self: Any, grad_RN: Tensor, *rest: Any) -> None:
        rows.append(len(grad_RN))
        plain(self, grad_RN, *rest)

    monkeypatch.setattr(logit_blocks.LogitBlocks, "second_pass", counted)
    tensors = made()
    weight, hidden = (tensors[name].requires_grad_() for name in ("weight", "hidden"))
    logprobs, _ = head_logprobs(Head(weight_VD=weight), hidden, tensors["ids"])
    kept = logprobs.log_softmax(-1) if balanced else logprobs
    (kept * tensors["factor"]).sum().backward()
    assert sum(rows) == expected
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_a_gradient_that_is_no_number_is_passed_on() -> None:
    tensors = made()
    weight, hidden = (tensors[name].requires_grad_() for name in ("weight", "hidden"))
    logprobs, _ = head_logprobs(Head(weight_VD=weight), hidden, tensors["ids"])
    tensors["factor"][3, 0] = torch.nan
    (logprobs * tensors["factor"]).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[3].isnan().all()
    assert hidden.grad[4].isfinite().all()


def made_support(tensors: dict[str, Tensor], share: float = 0.6) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return torch.rand(tensors["ids"].shape, generator=draw) < share


def found_outside(
    way: Way, tensors: dict[str, Tensor], head: dict[str, Any], **options: Any
) -> Any:
    """Log-probs, the log of the mass outside, and three gradients of both."""
    weight, bias, hidden = (
        tensors[name].clone().requires_grad_() for name in ("weight", "bias", "hidden")
    )
    logprobs, _, outside = way(
        Head(weight_VD=weight, bias_V=bias, **head), hidden, tensors["ids"], **options
    )
    outside_factor = tensors["factor"][:, 0] * outside.isfinite()
    loss = (logprobs * tensors["factor"]).sum() + (
        torch.where(outside.isfinite(), outside, 0.0) * outside_factor
    ).sum()
    loss.backward()
    return [logprobs.detach(), outside.detach(), hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("excluded", [(), ((0, 33), (70, 77))], ids=["all", "some left out"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_mass_outside_a_support_equals_all_logits_at_once(
    transform: LogitTransform, excluded: IdRanges
) -> None:
    tensors = made()
    for start, end in excluded:
        tensors["ids"] = tensors["ids"].where(
            (tensors["ids"] < start) | (tensors["ids"] >= end), torch.tensor(40)
        )
    head = {"transform": transform, "excluded_ids": excluded}
    options: dict[str, Any] = {"support_RN": made_support(tensors), "temperature": 0.7}
    ours = found_outside(head_logprobs, tensors, head, **options)
    assert_close(ours, found_outside(reference_logprobs, tensors, head, **options))


def test_outside_of_all_ids_there_is_nothing_and_no_gradient() -> None:
    tensors = made(vocab_size=8, num_ids=8)
    tensors["ids"] = torch.arange(8).expand(50, 8).contiguous()
    support = torch.ones(50, 8, dtype=torch.bool)
    support[25:, 3] = False
    ours = found_outside(head_logprobs, tensors, {}, support_RN=support)
    assert ours[1][:25].isneginf().all()
    assert_close([ours[1][25:]], [ours[0][25:, 3]])
    assert all(gradient.isfinite().all() for gradient in ours[2:])


@pytest.mark.parametrize("log10_mass", [-1, -4, -7, -9, -12, -30])
def test_the_mass_outside_is_right_where_it_is_next_to_nothing(log10_mass: int) -> None:
    """Against float64, down to masses that 1 less a sum in float32 knows nothing of."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 100, generator=draw, dtype=torch.float64)
    ids = logits.topk(4).indices
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    shift = -log10_mass * np.log(10.0)
    logits = torch.where(inside, logits + shift, logits).requires_grad_()
    exact = logits.masked_fill(inside, -torch.inf).logsumexp(1) - logits.logsumexp(1)
    exact.sum().backward()

    hidden = logits.detach().float().requires_grad_()
    weight = torch.eye(100).requires_grad_()
    support = torch.ones_like(ids, dtype=torch.bool)
    _, _, ours = head_logprobs(Head(weight_VD=weight), hidden, ids, support_RN=support)
    ours.sum().backward()
    assert (ours.double() - exact).abs().max() < 1e-5  # of the mass, its log's absolute error
    assert logits.grad is not None
    assert hidden.grad is not None
    assert ((hidden.grad.double() - logits.grad).abs() / logits.grad.abs()).max() < 1e-4
