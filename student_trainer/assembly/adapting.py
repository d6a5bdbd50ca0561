"""The low-rank adapter of a run: what it is, what it begins with, how it comes to the sampler."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, PreTrainedModel

from student_trainer.errors import ConfigError
from student_trainer.learner.adapter import (
    ADAPTER_FILE,
    ALL_LINEAR,
    CONFIG_FILE,
    Adapter,
    LoraShape,
    adapted,
    check_base,
    config_of,
    is_adapter,
    new_config,
    written_config,
)
from student_trainer.learner.families import turn_dropout_off
from student_trainer.rollouts.samplers.vllm_adapter import AdapterInVllm, why_no_adapter
from student_trainer.rollouts.weight_folder import WeightFolder
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.lora import LoraSettings
from student_trainer.settings.sampler import VllmSamplerSettings

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(config: TrainerConfig) -> LoraConfig | None:
    """peft's configuration of the run's adapter; None where the weights themselves are trained.

    Raises ConfigError, CheckpointError.
    """
    settings, student = config.student.lora, config.student.model
    if settings is None:
        return None
    if settings.adapter is None:
        return new_config(_shape(settings), student)
    found = config_of(settings.adapter)
    check_base(settings.adapter, found, settings.base_name or student)
    found.base_model_name_or_path = student
    # Of one that is used and not trained on peft would freeze the matrices too.
    found.inference_mode = False
    return found


def model_of(config: TrainerConfig, checkpoint: Path | None) -> str:
    """What learner and sampler load: the checkpoint of an adapter has the adapter alone."""
    is_whole = config.student.lora is None and checkpoint is not None
    return str(checkpoint) if is_whole else config.student.model


def adapter(
    config: TrainerConfig, model: PreTrainedModel, checkpoint: Path | None
) -> Adapter | None:
    """The adapter, in the model, as a checkpoint has it, or the one that a run begins with.

    Raises ConfigError, CheckpointError.
    """
    if (found := lora_config(config)) is None or config.student.lora is None:
        return None
    made = adapted(model, found)
    turn_dropout_off(model)
    if (start := checkpoint or config.student.lora.adapter) is not None:
        made.load(start)
    return made


def with_adapter_of(config: TrainerConfig, model: Path) -> TrainerConfig:
    """The same for a student that is trained already: with its adapter, where `model` is one, and
    else without any."""
    settings = config.student.lora
    lora = None
    if is_adapter(model):
        sync, name = (settings.sync, settings.base_name) if settings else ("auto", None)
        lora = LoraSettings(adapter=model, sync=sync, base_name=name)
    return config.model_copy(update={"student": config.student.model_copy(update={"lora": lora})})


def shape_of(config: TrainerConfig) -> LoraShape | None:
    """Of the run's adapter, for what it will take; None without one."""
    settings, found = config.student.lora, lora_config(config)
    if settings is None or found is None or settings.adapter is None:
        return None if settings is None else _shape(settings)
    # A pattern of an adapter that is there finds no more than every linear layer.
    targets = found.target_modules
    return LoraShape(
        rank=found.r,
        alpha=found.lora_alpha,
        targets=ALL_LINEAR if targets is None or isinstance(targets, str) else (*targets,),
        rslora=found.use_rslora,
    )


def _shape(settings: LoraSettings) -> LoraShape:
    return LoraShape(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        rslora=settings.rslora,
    )


def in_vllm(config: TrainerConfig) -> AdapterInVllm | None:
    """The adapter that vLLM has beside the base; None where it gets whole weights.

    "auto" is whole weights in float32. On a CPU vLLM's own products with an adapter make every
    token of SmolLM2 2.5 times as long, and the sync of all weights takes half a second more; on a
    GPU its kernels assert 16 bits (`lora_shrink`). Raises ConfigError where it is to have it, and
    vLLM does not take it.
    """
    settings, found = config.student.lora, lora_config(config)
    if settings is None or found is None or not isinstance(config.sampler, VllmSamplerSettings):
        return None
    dtype = config.sampler.dtype if config.sampler.dtype != "auto" else config.student.dtype
    if settings.sync == "merged" or (settings.sync == "auto" and dtype == "float32"):
        return None
    rank = max(found.r, *(found.rank_pattern or {}).values(), 0)
    why_not = _why_not(config.student.model, rank)
    if dtype == "float32" and torch.cuda.is_available():
        why_not = "vLLM's kernels for adapters on a GPU take 16 bits, sampler.dtype is float32"
    if settings.sync == "adapter" and why_not is not None:
        raise ConfigError(f'student.lora.sync is "adapter", and {why_not}: "merged" or "auto"')
    return None if why_not else AdapterInVllm(rank=rank)


def adapter_passage(config: TrainerConfig, weights_dir: Path | None) -> WeightFolder:
    """How its matrices come into the engine's process: as peft's files, a few megabytes."""
    found = lora_config(config)
    assert found is not None, "asked how an adapter travels that is not there"
    place = weights_dir or Path(tempfile.gettempdir())
    return WeightFolder(place, file=ADAPTER_FILE, beside={CONFIG_FILE: written_config(found)})


@cache
def _why_not(model: str, rank: int) -> str | None:
    return why_no_adapter(AutoConfig.from_pretrained(model).architectures or (), rank)
