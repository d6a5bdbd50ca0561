"""Settings of the engine that generates. What of them a device does not have, it does not read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from student_trainer.settings.lora import LoraSettings
from student_trainer.settings.section import MayChange, Section, default_kind
from vllm_process.cores import CORES_PATTERN
from vllm_process.devices import GPUS_PATTERN

SamplerDtype = Literal["auto", "float32", "bfloat16", "float16"]


class VllmSamplerSettings(Section):
    """vLLM, in processes of its own."""

    kind: Literal["vllm"] = "vllm"
    """The engine."""
    dtype: SamplerDtype = "auto"
    """Arithmetic of the sampler's copy of the student; auto is `student.dtype`."""
    max_num_seqs: Annotated[int, MayChange()] = Field(64, gt=0)
    """Rollouts generated at once; more wait."""
    stream_interval: Annotated[int, MayChange()] = Field(8, gt=0)
    """Tokens a rollout hands out at once: fewer are judged sooner and cost more processor time."""
    kv_cache_gib: Annotated[float, MayChange()] = Field(1.0, gt=0)
    """Memory of the KV cache on a CPU, in GiB."""
    gpu_memory_utilization: Annotated[float, MayChange()] = Field(0.5, gt=0, le=1)
    """Share of a GPU's memory that weights and KV cache may take; the learner needs the rest."""
    tensor_parallel_size: Annotated[int, MayChange()] = Field(1, gt=0)
    """GPUs that share each layer of the sampler's copy; on a CPU processes, each on as many of
    `cpu_cores`."""
    gpus: Annotated[str, MayChange()] = Field("auto", pattern=GPUS_PATTERN)
    """GPUs of the engines of a host, by their numbers among those that its processes see, such as
    "4,5,6,7": each process takes `tensor_parallel_size` of them, in their order. "auto" is the GPU
    that the process learns on; for an engine over several, the first ones."""
    enforce_eager: Annotated[bool, MayChange()] = True
    """Without compiled graphs: starts sooner, generates slower."""
    cpu_cores: Annotated[str, MayChange()] = Field("auto", pattern=CORES_PATTERN)
    """Cores of the engine on a CPU: "0" or "2,3", "auto" for all but those that vLLM spares, or
    "shared" for all, each given away while it waits; "shared:1" is one thread on any of them."""
    weights_dir: Annotated[Path | None, MayChange()] = None
    """Folder that the learner's weights pass through as a file on their way to the sampler; none:
    no file, but 32 MiB of memory that learner and sampler share, whatever the size of the model."""
    weight_transfer: Annotated[Literal["host", "ipc", "nccl"], MayChange()] = "host"
    """How the learner's weights reach the engine. "host": through the host's memory, or
    `weights_dir`. On GPUs by vLLM's own weight transfer: "ipc", CUDA IPC, for an engine on the
    learner's GPU alone; "nccl" for one on other GPUs of the host."""
    sleep_level: Annotated[Literal[0, 1, 2], MayChange()] = 0
    """What an engine on the learner's GPU gives up while the learner learns, with
    `rollout.max_staleness` 0. 1: its KV cache, and its weights to the host's memory. 2: both for
    good. 0: nothing."""


class HfSamplerSettings(Section):
    """transformers, one rollout and one token at a time: the reference, obvious and slow."""

    kind: Literal["hf"]
    dtype: SamplerDtype = "auto"
    """Arithmetic of the sampler's copy of the student; auto is float32."""


class HfBatchedSamplerSettings(Section):
    """transformers with continuous batching, in the trainer's process: starts in a second, needs no
    vLLM, and is the faster one for small models."""

    kind: Literal["hf_batched"]
    dtype: SamplerDtype = "auto"
    """Arithmetic of the sampler's copy of the student; auto is `student.dtype`."""
    weights: Annotated[Literal["auto", "shared", "copied"], MayChange()] = "auto"
    """Whose weights it generates with. "shared": the learner's own model, so that nothing is loaded
    or sent; needs float32 on both sides and `rollout.max_staleness` 0. "copied": a model of its
    own. "auto": shared where it can be."""
    max_num_seqs: Annotated[int, MayChange()] = Field(64, gt=0)
    """Rollouts generated at once; more wait."""
    stream_interval: Annotated[int, MayChange()] = Field(8, gt=0)
    """Tokens a rollout hands out at once: fewer are judged sooner and cost more processor time."""
    kv_cache_gib: Annotated[float, MayChange()] = Field(1.0, gt=0)
    """Memory that the KV cache may come to, in GiB: as many rollouts as it holds to their ends, up
    to `max_num_seqs`, are generated at once. Less is taken where less is needed."""
    cpu_threads: Annotated[int | None, MayChange()] = Field(None, gt=0)
    """Threads of a step on a CPU; none: one for a student of less than ten million parameters, else
    as many as PyTorch takes."""


def why_not(
    sampler: VllmSamplerSettings | HfSamplerSettings | HfBatchedSamplerSettings,
    lora: LoraSettings | None,
    max_staleness: int,
) -> str | None:
    """Why a student cannot come to its sampler so; None where it can."""
    by_adapter = lora is not None and lora.sync == "adapter"
    if not isinstance(sampler, VllmSamplerSettings):
        if not by_adapter:
            return None
        return (
            f'student.lora.sync is "adapter", and sampler.kind is "{sampler.kind}": only vLLM has '
            'an adapter beside its base; "merged" or "auto"'
        )
    way, level = sampler.weight_transfer, sampler.sleep_level
    if way != "host" and sampler.weights_dir is not None:
        return (
            f'sampler.weight_transfer is "{way}", and sampler.weights_dir names a folder: "host" '
            "for the folder, or no folder"
        )
    if way != "host" and by_adapter:
        return by_files(way)
    if level == 2 and by_adapter:
        return without_its_base()
    if level and max_staleness:
        return (
            f"sampler.sleep_level is {level}, and rollout.max_staleness is {max_staleness}: it "
            "generates while the learner learns; sleep_level 0, or max_staleness 0"
        )
    return None


def by_files(way: str) -> str:
    """Why an adapter beside its base does not come by vLLM's weight transfer."""
    return (
        f'sampler.weight_transfer is "{way}", and the adapter comes beside its base, as files: '
        '"host", or student.lora.sync = "merged"'
    )


def without_its_base() -> str:
    """Why an engine that has an adapter beside its base does not give the base up."""
    return (
        "sampler.sleep_level is 2, and the adapter's base is not sent again: 1, or "
        'student.lora.sync = "merged"'
    )


SamplerSettings = Annotated[
    VllmSamplerSettings | HfSamplerSettings | HfBatchedSamplerSettings,
    Field(discriminator="kind"),
    default_kind("kind", "vllm"),
]
