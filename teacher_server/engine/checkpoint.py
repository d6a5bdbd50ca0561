"""What a checkpoint's configuration says, read without loading a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_wire.errors import EngineError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_config(model: str, revision: str | None) -> PretrainedConfig:
    """The configuration of a local folder or a hub id; raises EngineError when there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise EngineError(f"no readable model at {model}: {error}") from error


def resolve_dtype(dtype: str, config: PretrainedConfig) -> str:
    """ "auto" is the dtype the checkpoint was saved in, float32 when it does not say."""
    if dtype != "auto":
        return dtype
    return "float32" if config.dtype is None else str(config.dtype).removeprefix("torch.")
