"""What a model takes of the memory that it is to have, term by term, before anything is loaded.

`serve` refuses what cannot be; `teacher-server doctor` shows the arithmetic of what can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from preflight.checkpoints import model_json
from preflight.gpus import Driver
from preflight.memory import free_memory, total_memory
from teacher_server.engine.vllm_engine import CPU_KV_CACHE_GIB
from teacher_server.settings import TeacherConfig
from vllm_process.model_memory import (
    DTYPE_BYTES,
    MemoryNeed,
    ModelMemoryError,
    kv_bytes_per_token,
    needed_bytes,
    stored_weights_bytes,
    weights_bytes,
)

GB, GIB = 1e9, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What is needed of one device, or of the machine, and what there is."""

    terms: str
    """The arithmetic, in words."""
    certain_bytes: float
    """Weights and the KV cache of one session of max_context: without these nothing starts."""
    likely_bytes: float
    """With what an engine takes beside them, which is an estimate."""
    room_bytes: float
    """That may be taken now."""
    all_bytes: float
    """That could be if nobody else had any."""
    room: str
    """Whose it is, in words."""
    remedy: str

    @property
    def never(self) -> bool:
        """It cannot be."""
        return self.certain_bytes > self.all_bytes

    @property
    def hardly(self) -> bool:
        """It is likely not to be."""
        return self.likely_bytes > self.room_bytes


def num_positions_of(about: Mapping[str, Any]) -> int | None:
    """Of the configuration as it is written; None where it does not say, or scales them."""
    text = about.get("text_config") or about
    scaled = text.get("rope_scaling") or text.get("rope_parameters")
    limit = text.get("max_position_embeddings")
    return None if scaled and "factor" in str(scaled) else limit


def fit_on_gpu(config: TeacherConfig, about: Mapping[str, Any], found: Driver) -> Fit:
    """Of the fullest of the engine's GPUs. Raises ModelMemoryError, and ValueError without GPUs."""
    ranks, stages = config.tensor_parallel_size, config.pipeline_parallel_size
    gpus = found.gpus[: ranks * stages * config.data_parallel_size]
    least = min(gpus, key=lambda gpu: gpu.total_bytes)
    share = config.gpu_memory_utilization if config.engine == "vllm" else 1.0
    room = least.total_bytes * share
    context = _context(config, about)
    need = _needed(config, about, context)
    token = kv_bytes_per_token(
        about, config.dtype, tensor_parallel_size=ranks, pipeline_parallel_size=stages
    )
    parts = "" if ranks * stages == 1 else f" on each of {ranks * stages} GPUs"
    other = need.working_bytes + need.allowance_bytes
    kv = config.kv_cache_gib * GIB or max(0.0, room - need.weights_bytes - other)
    sure = need.weights_bytes + need.kv_cache_bytes
    terms = (
        f"weights {_gb(need.weights_bytes)} + KV {_gb(need.kv_cache_bytes)} ({token:,} B a token x "
        f"{context:,} tokens) + engine {_gb(other)} = {_gb(sure + other)}{parts}; "
        f"{_sessions(kv, token, context)}"
    )
    name = f"GPU {least.index} ({least.name})"
    return Fit(
        terms=terms,
        certain_bytes=sure,
        likely_bytes=sure + other,
        room_bytes=room,
        all_bytes=room,
        room=f"{name} has {_gb(least.total_bytes)} x {share:g} = {_gb(room)}",
        remedy="a smaller max_context, dtype bfloat16, a larger tensor_parallel_size, or a smaller "
        "model",
    )


def fit_on_cpu(config: TeacherConfig, about: Mapping[str, Any]) -> Fit:
    """Of the machine's memory. Raises ModelMemoryError."""
    context = _context(config, about)
    weights = _weights(config, about)
    token = kv_bytes_per_token(about, config.dtype)
    if config.engine == "vllm":
        kv = (config.kv_cache_gib or CPU_KV_CACHE_GIB) * GIB
        cache = f"KV cache {_gb(kv)} ({token:,} B a token"
    else:
        kv = float(token * context)
        cache = f"KV {_gb(kv)} ({token:,} B a token x {context:,} tokens of a session"
    free = free_memory()
    copies = config.data_parallel_size
    total = f" x {copies} copies" if copies > 1 else ""
    room = f"{_gb(free)} of memory are free" if free is not None else "nothing says what is free"
    return Fit(
        terms=f"weights {_gb(weights)}{total} + {cache}) = {_gb(weights * copies + kv)}; "
        f"{_sessions(kv, token, context) if config.engine == 'vllm' else 'more with each session'}",
        certain_bytes=float(weights * copies),
        likely_bytes=weights * copies + kv,
        room_bytes=float("inf") if free is None else free,
        all_bytes=total_memory() or float("inf"),
        room=room,
        remedy="a smaller kv_cache_gib or max_context, dtype bfloat16, or a smaller model",
    )


def least_kv_gib(config: TeacherConfig, about: Mapping[str, Any], *, on_gpu: bool) -> float:
    """What vLLM's cache has at least: room for one session of max_context. Of one GPU, or of all
    processes of a CPU together. Raises ModelMemoryError."""
    sizes = (config.tensor_parallel_size, config.pipeline_parallel_size)
    token = kv_bytes_per_token(
        about, config.dtype, tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1]
    )
    of_one = token * _context(config, about) / GIB
    return of_one if on_gpu else of_one * prod((*sizes, config.data_parallel_size))


def _context(config: TeacherConfig, about: Mapping[str, Any]) -> int:
    limit = num_positions_of(about)
    return config.max_context if limit is None else min(config.max_context, limit)


def _needed(config: TeacherConfig, about: Mapping[str, Any], context: int) -> MemoryNeed:
    ranks, stages = config.tensor_parallel_size, config.pipeline_parallel_size
    try:
        return needed_bytes(
            about,
            config.dtype,
            max_model_len=context,
            tensor_parallel_size=ranks,
            pipeline_parallel_size=stages,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
    except ModelMemoryError:
        # Quantised, or of a family whose layers are not counted: what its files take.
        weights = _stored(config)
        token = kv_bytes_per_token(
            about, config.dtype, tensor_parallel_size=ranks, pipeline_parallel_size=stages
        )
        return MemoryNeed(
            weights_bytes=weights // (ranks * stages),
            kv_cache_bytes=token * context,
            working_bytes=GIB,
            num_gpus=ranks * stages,
        )


def _weights(config: TeacherConfig, about: Mapping[str, Any]) -> int:
    try:
        return weights_bytes(about, config.dtype)
    except ModelMemoryError:
        return _stored(config)


def _stored(config: TeacherConfig) -> int:
    folder = Path(config.model)
    found = stored_weights_bytes(folder) if folder.is_dir() else None
    if found is None:
        raise ModelMemoryError(
            f"the size of {config.model!r} does not follow from its configuration, and there are "
            "no safetensors at hand to count"
        )
    # Files say nothing of an arithmetic that is not theirs; quantised weights keep theirs.
    return found if config.dtype in ("auto", "bfloat16", "float16") else found * _wider(config)


def _wider(config: TeacherConfig) -> int:
    about = model_json(config.model, config.revision) or {}
    stored = str(about.get("dtype") or about.get("torch_dtype") or "float32")
    return DTYPE_BYTES["float32"] // DTYPE_BYTES.get(stored.removeprefix("torch."), 4)


def _sessions(kv_bytes: float, token: int, context: int) -> str:
    tokens = int(kv_bytes // token)
    return f"room for {tokens:,} tokens, {tokens / context:,.1f} sessions of {context:,}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.1f} GB" if num_bytes >= 0.05 * GB else f"{num_bytes / 1e6:,.1f} MB"
