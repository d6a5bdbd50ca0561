"""Weights as they are sent, a layer at a time, are those of a saved checkpoint.

Run: python -m pytest tests/trainer/learner/test_export.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from student_trainer.learner import export
from student_trainer.records import AS_LEARNT, WeightFormat
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_families import FAMILIES, tiny_family
from tests.trainer.learner.tiny_student import tiny_student

AS_SAVED = WeightFormat(as_saved=True)


def at_once(model: PreTrainedModel) -> dict[str, Tensor]:
    """The slow way: all tensors, each once, converted together."""
    seen: set[int] = set()
    once = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (tensor.data_ptr() in seen or seen.add(tensor.data_ptr()))  # type: ignore[func-returns-value]
    }
    return revert_weight_conversion(model, once)  # type: ignore[no-untyped-call,no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_at_a_time_is_what_all_at_once_is(family: str) -> None:
    model = tiny_family(family)
    given = [*export.exported(model, AS_SAVED)]
    expected = at_once(model)
    assert len(given) == len(expected)
    for name, tensor in given:
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()
    said = [(t.name, t.dtype, t.shape, t.num_bytes) for t in export.announced(model, AS_SAVED)]
    of = [(n, str(t.dtype).removeprefix("torch."), (*t.shape,), t.nbytes) for n, t in given]
    assert said == of


def test_tensors_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no second copy of the model is ever there."""
    model = tiny_family("qwen3_moe")
    converted: list[int] = []

    def noted(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        converted.append(len(weights))
        return revert_weight_conversion(model, weights)  # type: ignore[no-untyped-call,no-any-return]

    monkeypatch.setattr(export, "revert_weight_conversion", noted)
    weights: Iterator[tuple[str, Tensor]] = export.exported(model, AS_SAVED)
    assert converted == []
    assert next(weights)[0] == "model.embed_tokens.weight"
    assert converted == [1]
    assert next(weights)[0].startswith("model.layers.0.")
    assert len(converted) == 2
    assert sum(1 for _ in weights) > 0
    assert len(converted) == 4  # two layers, and what is around them


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tensors_are_in_the_samplers_arithmetic_and_tied_ones_are_named(dtype: str | None) -> None:
    learner = learner_of(tiny_student(tied=True))
    given = dict(learner.weights(WeightFormat(dtype=dtype)))
    assert {str(tensor.dtype) for tensor in given.values()} == {f"torch.{dtype or 'float32'}"}
    assert learner.tied_names() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in given
    assert sum(t.nbytes for t in given.values()) == learner.export_bytes(WeightFormat(dtype=dtype))
    assert learner_of(tiny_student()).tied_names(AS_LEARNT) == {}
