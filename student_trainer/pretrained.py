"""What is read of a Hugging Face checkpoint, a folder or a name: the student and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from student_trainer.errors import CheckpointError, ConfigError, one_line
from student_trainer.learner.families import (
    Attention,
    attention_for,
    check_family,
    turn_dropout_off,
    without_randomness,
)
from teacher_wire.tokenizer_file import faithful


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, of its file whatever class it names.

    Raises CheckpointError naming the path.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        return faithful(
            tokenizer,
            Path(file) if file else None,
            lambda: PreTrainedTokenizerFast.from_pretrained(path),
        )
    # A malformed file is whatever the library that reads it makes of it.
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(f"{path}: cannot load a tokenizer: {reason}") from error


def load_text_config(path: str) -> PretrainedConfig:
    """Of a checkpoint's model, or of its text part. Raises CheckpointError naming the path."""
    try:
        text: PretrainedConfig = AutoConfig.from_pretrained(path).get_text_config(decoder=True)
        return text
    # Whatever the library that reads it makes of a malformed file.
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(f"{path}: cannot read its configuration: {reason}") from error


def load_vocab_size(path: str) -> int:
    """Logits of a checkpoint's model. Raises CheckpointError naming the path."""
    return int(load_text_config(path).vocab_size)


def load_generation_config(path: str) -> GenerationConfig:
    """What a checkpoint says of how it ends; of its config, where it has no file for that.

    Raises CheckpointError naming the path.
    """
    try:
        if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False):
            return GenerationConfig.from_pretrained(path)
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))
    # A malformed file is whatever the library that reads it makes of it.
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(f"{path}: cannot read its generation_config: {reason}") from error


def tensor_names(path: str) -> frozenset[str] | None:
    """Of a checkpoint's safetensors; None for one that has none."""
    found = [
        cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    ]
    if found[0]:
        return frozenset(json.loads(Path(found[0]).read_text(encoding="utf-8"))["weight_map"])
    if not found[1]:
        return None
    with safe_open(found[1], framework="pt") as weights:
        return frozenset(weights.keys())


def refuse_quantised(path: str) -> None:
    """Raises CheckpointError for a student of fewer bits, before it is loaded: neither its weights
    nor an adapter on them could be trained."""
    try:
        config = AutoConfig.from_pretrained(path)
    # Whatever the library that reads it makes of a malformed file.
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(f"{path}: cannot read its configuration: {reason}") from error
    if (found := getattr(config, "quantization_config", None)) is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise CheckpointError(
            f"{path}: its weights are quantised ({method}), so it can be neither trained nor "
            "saved, nor be the base of an adapter: take the checkpoint that they were made from"
        )


def load_student(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention = "auto",
    gradient_checkpointing: bool = False,
    computes_in: torch.dtype | None = None,
) -> PreTrainedModel:
    """A causal language model in training mode, without dropout. `dtype` is that of its weights.

    With float32 weights it is proven that the learner's log-probs are the model's own. Raises
    CheckpointError naming the path, ConfigError for an attention that cannot be had.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json, not a Hugging Face checkpoint")
    try:
        config = without_randomness(AutoConfig.from_pretrained(path))
        kind = attention_for(config, attention, dtype=computes_in or dtype, device=device)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=kind
        )
    except ConfigError:
        raise
    # Whatever a checkpoint's files and the model's code make of them.
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(f"{path}: cannot load a student: {reason}") from error
    torch.nn.Module.to(model, device)
    model.train()
    turn_dropout_off(model)
    if dtype == torch.float32:
        try:
            check_family(model)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
