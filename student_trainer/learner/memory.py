"""How much memory a learner takes, by arithmetic, before anything is loaded.

Bytes a token and layer were counted with `torch.autograd.graph.saved_tensors_hooks` on models of
several families, and a test holds the formula against such a count. It is meant to be right to a
fifth, and to be read: what does not fit is refused with its terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import preflight.memory
from student_trainer.errors import ConfigError
from student_trainer.learner.adapter import LoraShape, num_adapted
from student_trainer.learner.families import attention_for
from student_trainer.learner.logit_blocks import BLOCK
from student_trainer.learner.optim import STATE_BYTES, OptimizerKind

GB = 1e9
BACKWARD_OF_A_LAYER = 0.5
"""Gradients under way while a layer is gone back through, of what the layer keeps."""
HEAD_BLOCKS = 4
"""Blocks of logits alive at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerMemory:
    """Bytes, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass of the largest micro-batch."""
    rounded_weights: float
    """Copies of weights in the arithmetic's 16 bits."""
    head: float
    """Blocks of the head's logits."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def __str__(self) -> str:
        terms = [
            f"{field.name.replace('_', ' ')} {getattr(self, field.name) / GB:.1f}"
            for field in fields(self)
            if getattr(self, field.name) >= 0.05 * GB
        ]
        return f"{self.total / GB:.1f} GB" + (f" ({' + '.join(terms)})" if terms else "")


def learner_memory(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    optimizer: OptimizerKind,
    tokens: int,
    longest: int,
    gradient_checkpointing: bool,
    device: torch.device,
    counts: ParameterCounts | None = None,
) -> LearnerMemory:
    """For micro-batches of up to `tokens`, a longest sequence of `longest`.

    `counts` are the `parameter_counts`; None makes the model to count them, all of it trained.
    """
    text = config.get_text_config(decoder=True)
    counts = counts or parameter_counts(config)
    held, trained, in_layers = counts.frozen, counts.trained, counts.in_layers
    layers, hidden = text.num_hidden_layers, text.hidden_size
    a_layer = tokens * _layer_bytes_per_token(config, dtype, longest, device)
    if gradient_checkpointing:
        kept = layers * tokens * 4 * hidden + a_layer * (1 + BACKWARD_OF_A_LAYER)
    else:
        kept = a_layer * (layers + BACKWARD_OF_A_LAYER)
    # Frozen weights are held as they are computed with.
    rounded = 0 if dtype == torch.float32 or held else 2 * in_layers
    rows, ids = BLOCK["cpu" if device.type == "cpu" else "other"]
    return LearnerMemory(
        weights=dtype.itemsize * held + 4 * trained,
        gradients=4 * trained,
        optimizer=STATE_BYTES[optimizer] * trained,
        activations=kept + tokens * 24 * hidden,
        rounded_weights=rounded / (layers if gradient_checkpointing else 1),
        head=HEAD_BLOCKS * 4 * min(rows, tokens) * min(ids, text.vocab_size),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Of a student under training."""

    trained: int
    frozen: int
    in_layers: int
    """Of the student alone, all but embedding and head."""


def parameter_counts(config: PretrainedConfig, lora: LoraShape | None = None) -> ParameterCounts:
    """With an adapter the student itself is frozen. Takes no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    everything = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    ends = {model.get_input_embeddings().weight, head.weight}
    in_layers = everything - sum(parameter.numel() for parameter in ends)
    if lora is None:
        return ParameterCounts(trained=everything, frozen=0, in_layers=in_layers)
    adapted = num_adapted(model, lora, head)
    return ParameterCounts(trained=adapted, frozen=everything, in_layers=in_layers)


def checkpoint_bytes(
    path: str, optimizer: OptimizerKind, lora: LoraShape | None = None
) -> tuple[float, float]:
    """Of a checkpoint of a run, and of the student that it saves in the end: weights that are
    learnt in float32, and the optimizer's state. Raises what transformers raises for a checkpoint
    whose configuration cannot be read."""
    trained = parameter_counts(AutoConfig.from_pretrained(path), lora).trained
    return trained * (4 + STATE_BYTES[optimizer]), 4.0 * trained


def _layer_bytes_per_token(
    config: PretrainedConfig, dtype: torch.dtype, longest: int, device: torch.device
) -> float:
    """What one layer keeps of a token: inputs of norms, projections, attention and MLP."""
    text = config.get_text_config(decoder=True)
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    query = heads * head_dim
    key = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    inner = text.intermediate_size
    if experts := getattr(text, "num_experts_per_tok", None):
        inner = experts * (getattr(text, "moe_intermediate_size", None) or inner)
    if dtype == torch.float32:
        found = 24 * hidden + 20 * inner + 24 * query + 8 * key
    else:
        found = 26 * hidden + 10 * inner + 10 * query + 10 * key
    if attention_for(config, "auto", dtype=dtype, device=device) == "eager":
        found += 12 * heads * longest  # the scores, before and after the softmax
    return float(found)


def refuse_too_large(
    path: str,
    *,
    free_bytes: float,
    where: str,
    dtype: torch.dtype,
    optimizer: OptimizerKind,
    tokens: int,
    longest: int,
    gradient_checkpointing: bool,
    device: torch.device,
    lora: LoraShape | None = None,
    tell: Callable[[str], None] = lambda terms: None,
) -> str | None:
    """Raises ConfigError for a student that cannot fit even with checkpointing. `tell` is given the
    terms of what it takes, and what there is.

    Returns a sentence for one that fits only with it and is trained without, else None. A folder
    whose configuration cannot be read is left to whoever loads it.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        estimate = partial(
            learner_memory,
            config,
            dtype=dtype,
            optimizer=optimizer,
            tokens=tokens,
            longest=longest,
            device=device,
            counts=parameter_counts(config, lora),
        )
        with_it = estimate(gradient_checkpointing=True)
        as_set = estimate(gradient_checkpointing=gradient_checkpointing)
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None
    name = Path(path).name
    about = f"the student {name} takes about"
    has = f"{where} has {free_bytes / GB:.1f} GB free for it"
    tell(f"{about} {as_set} at its longest micro-batch, and {has}")
    if with_it.total > free_bytes:
        raise ConfigError(
            f"{about} {with_it} with gradient checkpointing and micro-batches of {tokens:,} "
            f"tokens, and {has}: a smaller optim.micro_batch_tokens or rollout.max_context, "
            "student.dtype 'bfloat16', optim.kind 'adamw_8bit', or a smaller student"
        )
    if as_set.total > free_bytes:
        return (
            f"{about} {as_set} at its longest micro-batch, and {has}: with "
            f"student.gradient_checkpointing = true it takes {with_it.total / GB:.1f} GB"
        )
    return None


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free where the learner runs; None where nothing says so."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free)
    if device.type != "cpu":
        return None
    return preflight.memory.free_memory()
