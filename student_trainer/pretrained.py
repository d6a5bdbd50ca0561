"""What is read of a Hugging Face checkpoint, a folder or a name: the student and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from student_trainer.errors import CheckpointError


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises CheckpointError naming the path."""
    try:
        return AutoTokenizer.from_pretrained(path)
    # A malformed file is whatever the library that reads it makes of it.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot load a tokenizer: {reason}") from error


def load_student(path: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model in training mode. Raises CheckpointError naming the path."""
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json, not a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(path)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype
        )
    # Whatever a checkpoint's files and the model's code make of them.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot load a student: {reason}") from error
    torch.nn.Module.to(model, device)
    model.train()
    return model
