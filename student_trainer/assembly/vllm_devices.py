"""Where a run's vLLM engine is, and what follows from that: how weights come to it, and whether it
may sleep."""

from __future__ import annotations

import torch

from student_trainer.errors import ConfigError
from student_trainer.pretrained import load_text_config
from student_trainer.process.ranks import place_on_host
from student_trainer.rollouts.samplers.vllm_adapter import AdapterInVllm
from student_trainer.rollouts.samplers.vllm_transfer import VllmTransfer
from student_trainer.settings.sampler import VllmSamplerSettings, by_files, without_its_base
from vllm_process.cores import CoresError, check_cores
from vllm_process.devices import DevicesError, check_tensor_parallel, gpus_of


def gpus(settings: VllmSamplerSettings, model: str, own: torch.device) -> tuple[int, ...]:
    """Those of the engine, none on a CPU; `own` is the learner's. Raises ConfigError for GPUs or
    cores that it cannot have, and for a student that cannot be cut for them, CheckpointError."""
    name, size = "sampler.tensor_parallel_size", settings.tensor_parallel_size
    try:
        if size > 1:
            check_tensor_parallel(name, size, load_text_config(model))
        if num_gpus := torch.cuda.device_count():
            return gpus_of(
                ("sampler.gpus", settings.gpus),
                (name, size),
                own=own.index or 0,
                place=place_on_host(),
                num_gpus=num_gpus,
            )
        if settings.gpus != "auto":
            raise ConfigError(
                f"sampler.gpus is {settings.gpus!r}, and this process sees no GPU: leave it out to "
                "generate on the CPU, or give the process its GPUs (--gpus, CUDA_VISIBLE_DEVICES)"
            )
        check_cores(settings.cpu_cores, size)
    except DevicesError as error:
        raise ConfigError(str(error)) from error
    except CoresError as error:
        raise ConfigError(f"sampler.cpu_cores is {settings.cpu_cores!r}, which {error}") from error
    return ()


def transfer(
    settings: VllmSamplerSettings,
    own: torch.device,
    gpus: tuple[int, ...],
    adapter: AdapterInVllm | None,
) -> VllmTransfer | None:
    """vLLM's weight transfer between the learner's device and the engine's GPUs; None for "host".

    Raises ConfigError where it cannot be.
    """
    way = settings.weight_transfer
    if way == "host":
        return None
    said = f'sampler.weight_transfer is "{way}"'
    if adapter is not None:
        raise ConfigError(by_files(way))
    if own.type != "cuda" or not gpus:
        raise ConfigError(f'{said}, and {_where(own, gpus)}: it needs CUDA on both sides; "host"')
    if way == "ipc" and gpus != (own.index,):
        raise ConfigError(
            f"{said}, and {_where(own, gpus)}: CUDA IPC shares the memory of one GPU, so that the "
            f'engine must be on cuda:{own.index} alone (sampler.gpus = "auto", '
            'sampler.tensor_parallel_size = 1); "nccl" or "host"'
        )
    if way == "nccl" and own.index in gpus:
        raise ConfigError(
            f"{said}, and {_where(own, gpus)}: NCCL joins different GPUs, so that the engine must "
            'be on others (sampler.gpus); "ipc" where it is on the learner\'s alone, or "host"'
        )
    return VllmTransfer(backend=way, device=own)


def sleep_level(
    settings: VllmSamplerSettings,
    own: torch.device,
    gpus: tuple[int, ...],
    adapter: AdapterInVllm | None,
) -> int:
    """Of the engine. Raises ConfigError where sleeping would give the learner nothing, or take from
    the engine what does not come again."""
    level = settings.sleep_level
    if level and (own.type != "cuda" or own.index not in gpus):
        raise ConfigError(
            f"sampler.sleep_level is {level}, and {_where(own, gpus)}: an engine sleeps for the "
            "learner's GPU; 0"
        )
    if level == 2 and adapter is not None:
        raise ConfigError(without_its_base())
    return level


def _where(own: torch.device, gpus: tuple[int, ...]) -> str:
    engines = ", ".join(f"cuda:{number}" for number in gpus) or "a CPU"
    return f"the learner is on {own}, the engine on {engines}"
