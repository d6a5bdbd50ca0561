"""What `serve` refuses before it imports or loads anything large, and `teacher-server doctor` looks
at by itself. Each raises ConfigError: setting, value, limit and remedy."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from preflight.checkpoints import (
    CheckpointFileError,
    check_stored,
    check_tokenizer_files,
    model_json,
)
from preflight.gpus import Driver, driver
from preflight.ports import listener, shown
from preflight.software import is_for_cuda, why_no_vllm
from teacher_server.engine.vllm_engine import CPU_KV_CACHE_GIB
from teacher_server.process.model_size import (
    fit_on_cpu,
    fit_on_gpu,
    least_kv_gib,
)
from teacher_server.settings import ConfigError, TeacherConfig

_NOT_OURS = "host must be an address of this machine, or 0.0.0.0"
_OF_ADDRESS = {
    errno.EADDRNOTAVAIL: _NOT_OURS,
    errno.EACCES: "ports below 1024 take privileges: choose another {name}",
}


def refuse_early(config: TeacherConfig) -> None:
    """All of them, in the order of what they cost."""
    check_ready_file(config)
    check_ports(config)
    if config.engine == "fake":
        return
    found = driver()
    check_accelerator(config, found)
    check_checkpoint(config)
    check_memory(config, found)
    check_tokenizer(config)


def check_ready_file(config: TeacherConfig) -> None:
    """Before the model is loaded for nothing."""
    name = config.ready_file
    path = Path(name)
    if not name:
        return
    if not path.parent.is_dir():
        why = f"there is no folder {str(path.parent)!r}: make it first"
    elif path.is_dir():
        why = "that is a folder: name a file in it"
    elif not os.access(path.parent, os.W_OK):
        why = f"the folder {str(path.parent)!r} cannot be written to: choose another"
    else:
        return
    raise ConfigError(f"ready_file is {name!r}, but {why}")


def check_ports(config: TeacherConfig) -> None:
    """That both can be listened on now."""
    for _ in free_ports(config):
        pass


def free_ports(config: TeacherConfig) -> Iterator[str]:
    """Each address that can be listened on, as it stands in a URL."""
    for kind, name, port in (
        ("gRPC", "grpc_port", config.grpc_port),
        ("HTTP", "http_port", config.http_port),
    ):
        try:
            listener(config.host, port).close()
        except OSError as error:
            raise ConfigError(cannot_listen(kind, name, config.host, port, error)) from error
        yield f"{kind} {shown(config.host, port)}" if port else f"{kind} on any free port"


def cannot_listen(kind: str, name: str, host: str, port: int, error: OSError) -> str:
    """Who, where, why, and what to set."""
    choice = _OF_ADDRESS.get(error.errno or 0, "choose another {name}")
    remedy = _NOT_OURS if isinstance(error, socket.gaierror) else choice.format(name=name)
    return f"{kind} cannot listen on {shown(host, port)}: {error.strerror}; {remedy}"


def check_accelerator(config: TeacherConfig, found: Driver) -> None:
    """That the engine's build has what it was made for."""
    if config.engine == "hf":
        if config.device == "cuda" and not found.is_there:
            raise ConfigError(
                f"device is 'cuda', and no NVIDIA GPU is seen here ({found.why_none}): take "
                "'cpu' or 'auto', or install the NVIDIA driver and give the container its GPUs "
                "(--gpus)"
            )
        return
    if why := why_no_vllm(found):
        raise ConfigError(f"engine is 'vllm', and {why}, or take engine 'hf'")


def check_checkpoint(config: TeacherConfig) -> None:
    """That what is here of the checkpoint is whole: a configuration, and every file of weights."""
    try:
        check_stored(config.model, config.revision)
    except CheckpointFileError as error:
        raise ConfigError(f"cannot read the checkpoint {config.model!r}: {error}") from error


def check_tokenizer(config: TeacherConfig) -> None:
    """That the folder which is to have the tokenizer has one."""
    try:
        check_tokenizer_files(config.tokenizer or config.model)
    except CheckpointFileError as error:
        other = "" if config.tokenizer else ", or name it by `tokenizer`"
        raise ConfigError(f"{error}{other}") from error


def check_memory(config: TeacherConfig, found: Driver) -> None:
    """That weights, and one session's KV cache, are not more than there can be. What does not
    follow from the configuration is left to whoever loads it."""
    try:
        about = model_json(config.model, config.revision)
        if about is None:
            return
        gpu = on_gpu(config, found)
        fit = fit_on_gpu(config, about, found) if gpu else fit_on_cpu(config, about)
        least = least_kv_gib(config, about, on_gpu=gpu)
    except (OSError, ValueError):  # ModelMemoryError and a broken config.json are ValueErrors
        return
    if fit.never:
        raise ConfigError(
            f"the model {config.model!r} is too large: {fit.terms}; {fit.room}: {fit.remedy}"
        )
    check_kv_cache(config, least, on_gpu=gpu)


def check_kv_cache(config: TeacherConfig, least_gib: float, *, on_gpu: bool) -> None:
    """That vLLM's cache has room for one session of max_context: it does not start without."""
    given = config.kv_cache_gib or (0.0 if on_gpu else CPU_KV_CACHE_GIB)
    if config.engine == "vllm" and given and given < least_gib:
        said = "" if config.kv_cache_gib else ", as it is where nothing is said on a CPU"
        raise ConfigError(
            f"kv_cache_gib is {given:g}{said}, and one session of max_context "
            f"{config.max_context:,} takes {least_gib:.3g} GiB: raise kv_cache_gib to that, or "
            "lower max_context"
        )


def num_devices(config: TeacherConfig) -> int:
    """Of vLLM's engine."""
    return config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size


def on_gpu(config: TeacherConfig, found: Driver) -> bool:
    """Whether the engine will be on GPUs whose memory is known."""
    if not found.gpus or not all(gpu.total_bytes for gpu in found.gpus):
        return False
    return is_for_cuda() if config.engine == "vllm" else config.device != "cpu"
