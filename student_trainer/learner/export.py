"""The learner's weights as a sampler reads them: which tensors, by which names, in which dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from student_trainer.records import WeightFormat


def export_weights(
    model: PreTrainedModel, to: Path, written: WeightFormat
) -> dict[str, str | None]:
    """Writes the weights as safetensors into a folder, each once.

    Returns the names of all tensors, and which other one each is again (a tied head the embedding),
    if any: those are not written.
    """
    weights: dict[str, Tensor] = {}
    again: dict[str, str | None] = {}
    for name, tensor, dtype, first in _exported(model, written):
        if first is None:
            weights[name] = tensor.to("cpu", dtype).contiguous()
        else:
            again |= zip(
                _named(model, name, tensor, written),
                _named(model, first, tensor, written),
                strict=True,
            )
    if written.as_saved:
        weights = revert_weight_conversion(model, weights)
    sent = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(sent, to / "model.safetensors", metadata={"format": "pt"})
    return dict.fromkeys(sent) | again


def export_bytes(model: PreTrainedModel, written: WeightFormat) -> int:
    """Of the tensors that `export_weights` writes."""
    return sum(
        tensor.numel() * dtype.itemsize
        for _, tensor, dtype, first in _exported(model, written)
        if first is None
    )


def _exported(
    model: PreTrainedModel, written: WeightFormat
) -> Iterator[tuple[str, Tensor, torch.dtype, str | None]]:
    """Name, tensor, how it is written, and under which name it came before, if it did. What is no
    parameter, such as a router's correction, keeps its own arithmetic."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        first = seen.setdefault(tensor.data_ptr(), name)
        is_converted = written.dtype is not None and name in parameters
        dtype = getattr(torch, str(written.dtype)) if is_converted else tensor.dtype
        yield name, tensor.detach(), dtype, None if first == name else first


def _named(model: PreTrainedModel, name: str, tensor: Tensor, written: WeightFormat) -> list[str]:
    """What one tensor is called where it is written, by itself: a head's name may change too."""
    alone = {name: tensor}
    return [*revert_weight_conversion(model, alone)] if written.as_saved else [*alone]
