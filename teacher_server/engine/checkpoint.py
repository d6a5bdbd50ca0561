"""What a checkpoint's configuration says, read without loading a weight."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from teacher_wire.errors import EngineError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)
_BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")


def read_config(model: str, revision: str | None) -> PretrainedConfig:
    """The configuration of a local folder or a hub id; raises EngineError when there is none."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise EngineError(f"no readable model at {model}: {error}") from error
    return config


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit of a hub's checkpoint that a revision stands for now, or that the cache has; None
    for what is in no repository. Raises EngineError as `read_config`."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        file = cached_file(model, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise EngineError(f"no readable model at {model}: {error}") from error
    commit: str | None = extract_commit_hash(file, None)
    return commit


def resolve_dtype(dtype: str, config: PretrainedConfig) -> str:
    """ "auto" is the dtype the checkpoint was saved in, float32 when it does not say."""
    if dtype != "auto":
        return dtype
    return "float32" if config.dtype is None else str(config.dtype).removeprefix("torch.")


def num_entries(config: PretrainedConfig) -> int:
    """Of the vocabulary; a model with a tower of another kind around it has it in its text part."""
    size: int = config.get_text_config(decoder=True).vocab_size
    return size


def num_positions(config: PretrainedConfig) -> int | None:
    """Tokens that the model was made for, scaled as its configuration says; None: it names no
    limit."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if not limit:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # Kinds of layers may each have their own.
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    return int(limit * max(float(table.get("factor") or 1.0) for table in tables))


def right_attention(config: PretrainedConfig) -> str | None:
    """What transformers must be told to use; None for its own choice, which is sdpa and passes over
    a soft-cap of the attention's scores without a word (Gemma 2)."""
    text = config.get_text_config(decoder=True)
    return None if getattr(text, "attn_logit_softcapping", None) is None else "eager"


def warn_if_emulated(dtype: str) -> None:
    """For engines on a CPU: few have bfloat16 arithmetic, and the others take six times as long."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    if dtype == "bfloat16" and not any(capabilities.get(name) for name in _BF16_CAPABILITIES):
        log.warning(
            "this CPU has no bfloat16 arithmetic: dtype float32 is about six times faster and "
            "takes twice the memory"
        )
