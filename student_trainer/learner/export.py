"""The learner's weights as a sampler reads them: which tensors, by which names, in which dtype.

An adapter of them is merged in, tensor by tensor, into what is handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from student_trainer.learner.adapter import Adapter, merged, own_name
from student_trainer.records import Announced, WeightFormat, WrittenTensor


def exported(
    model: PreTrainedModel, written: WeightFormat, adapter: Adapter | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors on the device that is asked for, each once, in the model's order.

    One layer after another is converted: with those that its receiver has passed on, no second copy
    of the model. A tensor may be the model's own memory. `adapter` is read where it goes alone.
    """
    if written.adapter_alone:
        found = _of_adapter(adapter, written)
        return ((n, t.to(written.device, dtype).contiguous()) for n, t, dtype in found)

    def whole(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return merged(model, name, tensor).to(written.device, dtype)

    weights = _converted(model, written, whole)
    return Announced(weights, announced(model, written)) if written.is_announced else weights


def announced(model: PreTrainedModel, written: WeightFormat) -> list[WrittenTensor]:
    """What `exported` will give of a model's weights, in its order. Nothing is copied for it, and
    no process asks another one for its part."""

    def empty(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype, device="meta")

    return [
        WrittenTensor(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes)
        for name, t in _converted(model, written, empty)
    ]


def _converted(
    model: PreTrainedModel,
    written: WeightFormat,
    taken: Callable[[str, Tensor, torch.dtype], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """What is `taken` of each tensor, by the names and in the layout that are asked for."""
    own = (item[:3] for item in _exported(model, written) if item[3] is None)
    for _, layer in groupby(own, key=lambda item: _layer_of(item[0])):
        weights = {name: taken(name, tensor, dtype) for name, tensor, dtype in layer}
        if written.as_saved:
            weights = revert_weight_conversion(model, weights)
        for name, tensor in weights.items():
            yield name, tensor.contiguous()


def tied_names(model: PreTrainedModel, written: WeightFormat) -> dict[str, str]:
    """Names of tensors that are another one again, such as a tied head, and the name of that."""
    again: dict[str, str] = {}
    if written.adapter_alone:
        return again
    for name, tensor, _, first in _exported(model, written):
        if first is not None:
            names = (_named(model, alias, tensor, written) for alias in (name, first))
            again |= zip(*names, strict=True)
    return again


def export_weights(model: PreTrainedModel, to: Path, written: WeightFormat) -> None:
    """Writes the weights as safetensors into a folder, each once."""
    sent = dict(exported(model, written))
    save_file(sent, to / "model.safetensors", metadata={"format": "pt"})


def export_bytes(
    model: PreTrainedModel, written: WeightFormat, adapter: Adapter | None = None
) -> int:
    """Of the tensors that `exported` gives."""
    if written.adapter_alone:
        return sum(t.numel() * dtype.itemsize for _, t, dtype in _of_adapter(adapter, written))
    return sum(
        tensor.numel() * dtype.itemsize
        for _, tensor, dtype, first in _exported(model, written)
        if first is None
    )


def _of_adapter(
    adapter: Adapter | None, written: WeightFormat
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Name, tensor, and how it is written."""
    if adapter is None:
        raise RuntimeError("asked for the adapter of a model without one")
    for name, tensor in adapter.tensors().items():
        yield name, tensor, getattr(torch, written.dtype or "float32")


def _exported(
    model: PreTrainedModel, written: WeightFormat
) -> Iterator[tuple[str, Tensor, torch.dtype, str | None]]:
    """Name, tensor, how it is written, and under which name it came before, if it did. What is no
    parameter, such as a router's correction, keeps its own arithmetic."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[int, str] = {}
    for found, tensor in model.state_dict().items():
        if (name := own_name(found)) is None:
            continue
        # The part of a spread tensor that a process has may be empty: a tied one is one parameter.
        tied = parameters.get(found)
        first = seen.setdefault(tensor.data_ptr() if tied is None else id(tied), name)
        is_converted = written.dtype is not None and tied is not None
        dtype = getattr(torch, str(written.dtype)) if is_converted else tensor.dtype
        yield name, tensor.detach(), dtype, None if first == name else first


def _layer_of(name: str) -> str:
    """Up to the first number: what a conversion of names and layouts has to see at once."""
    parts = name.split(".")
    return ".".join(parts[: next((i + 1 for i, p in enumerate(parts) if p.isdigit()), 0)])


def _named(model: PreTrainedModel, name: str, tensor: Tensor, written: WeightFormat) -> list[str]:
    """What one tensor is called where it is written, by itself: a head's name may change too."""
    alone = {name: tensor}
    return [*revert_weight_conversion(model, alone)] if written.as_saved else [*alone]
