"""A student of fewer layers: those that change the residual stream least are left out.

The change of a layer is 1 - cos(input, output), mean over positions (arXiv 2403.03853 calls it
block influence). The first two layers and the last stay whatever they do: they write and read the
stream. Nothing is trained here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from examples.demo import DemoError
from student_trainer.train_state import replaced

ALWAYS_KEPT = (0, 1, -1)
LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@torch.no_grad()
def residual_changes(
    model: LlamaForCausalLM, texts: Sequence[Tensor], *, skip: Sequence[int]
) -> list[float]:
    """1 - cosine of each layer's input and output, mean over the positions of the texts.

    Args:
        texts: token ids, [S] each.
        skip: how many positions at the start of each text do not count: its prompt.
    """
    sums, count = torch.zeros(len(model.model.layers), dtype=torch.float64), 0
    seen: list[Tensor] = []

    def observe(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        cosine_S = torch.cosine_similarity(inputs[0][0].double(), output[0].double(), dim=-1)
        seen.append(1.0 - cosine_S)

    hooks = [layer.register_forward_hook(observe) for layer in model.model.layers]
    try:
        for ids_S, start in zip(texts, skip, strict=True):
            seen.clear()
            model.model(input_ids=ids_S[None], use_cache=False)
            sums += torch.stack([change_S[start:].sum() for change_S in seen])
            count += len(ids_S) - start
    finally:
        for hook in hooks:
            hook.remove()
    return [float(change) for change in sums / count]


def kept_layers(changes: Sequence[float], num_kept: int) -> list[int]:
    """Which layers stay, in their order. Raises DemoError for a number that is not possible."""
    num_layers = len(changes)
    always = {index % num_layers for index in ALWAYS_KEPT}
    if not len(always) <= num_kept <= num_layers:
        raise DemoError(
            f"{num_kept} of {num_layers} layers cannot be kept, must be {len(always)} to "
            f"{num_layers}: the first two and the last stay"
        )
    others = [layer for layer in range(num_layers) if layer not in always]
    others.sort(key=lambda layer: -changes[layer])
    return sorted([*always, *others[: num_kept - len(always)]])


def pruned(model: LlamaForCausalLM, layers: Sequence[int]) -> LlamaForCausalLM:
    """The model with these layers alone, in this order."""
    config = deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    place = {layer: index for index, layer in enumerate(layers)}
    weights = {}
    for name, value in model.state_dict().items():
        match = LAYER.match(name)
        if match is None:
            weights[name] = value
        elif int(match[1]) in place:
            weights[f"model.layers.{place[int(match[1])]}.{name[match.end() :]}"] = value
    student = LlamaForCausalLM(config)
    student.load_state_dict(weights)
    student.generation_config = deepcopy(model.generation_config)
    return student.eval()


def save(student: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a student with the tokenizer of its teacher, in Hugging Face format."""
    with replaced(folder) as partial:
        student.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
