"""What is served: engine, tokenizer and their description, from the settings."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from teacher_server.engine.base import ScoringEngine
from teacher_server.engine.fake_engine import FakeEngine, fake_fingerprint
from teacher_server.settings import ConfigError, TeacherConfig
from teacher_wire import __version__
from teacher_wire.end_tokens import united
from teacher_wire.fingerprint import weights_digest
from teacher_wire.records import TeacherInfo
from teacher_wire.tokenizer_file import faithful
from teacher_wire.vocabulary import Vocabulary
from vllm_process.cores import CoresError, check_cores
from vllm_process.devices import (
    DevicesError,
    check_data_parallel,
    check_gpus,
    check_pipeline_parallel,
    check_tensor_parallel,
)

log = logging.getLogger(__name__)


def build_engine(config: TeacherConfig) -> ScoringEngine:
    """The engine of the configuration, not started. Imports no other engine. Raises ConfigError."""
    if config.engine == "fake":
        return FakeEngine(
            vocab_size=config.fake_vocab_size,
            max_context=config.max_context,
            max_k=min(config.max_k, config.fake_vocab_size),
            prefill_tokens_per_s=config.fake_tokens_per_s,
            base_latency_s=config.fake_latency_s,
            step_tokens=config.fake_step_tokens,
        )
    if config.engine == "hf":
        from teacher_server.engine.hf_engine import HfEngine

        _check_torch_device(config.device)
        return HfEngine(**_of_models(config), device=config.device, max_sessions=config.hf_sessions)
    check_devices(config)
    from teacher_server.engine.vllm_engine import VllmEngine

    return VllmEngine(
        **_of_models(config),
        block_size=config.block_size,
        kv_cache_gib=config.kv_cache_gib or None,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        head_dtype=config.head_dtype,
        enforce_eager=config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        data_parallel_size=config.data_parallel_size,
        executor=config.executor,
        cpu_cores=config.cpu_cores,
    )


def pinned_to_commit(config: TeacherConfig) -> TeacherConfig:
    """The same with the commit of a hub's checkpoint for its revision: all that is read of it is of
    one commit, and clients tell replicas at different ones apart. A folder has a digest.

    Raises EngineError for a checkpoint that cannot be read.
    """
    if config.engine == "fake" or not config.model or Path(config.model).is_dir():
        return config
    from teacher_server.engine.checkpoint import commit_of

    commit = commit_of(config.model, config.revision or None)
    if commit is None:
        return config
    log.info("%s is at commit %s", config.model, commit)
    return config.model_copy(update={"revision": commit})


def _of_models(config: TeacherConfig) -> dict[str, Any]:
    """What every engine with a model is made of."""
    return {
        "model": config.model,
        "revision": config.revision or None,
        "dtype": config.dtype,
        "max_context": max_context(config),
        "max_k": config.max_k,
    }


def max_context(config: TeacherConfig) -> int:
    """That of the settings; where nobody has set it, no more than the model has positions. Raises
    ConfigError where somebody has, and EngineError for a checkpoint that cannot be read."""
    from teacher_server.engine.checkpoint import num_positions, read_config

    limit = num_positions(read_config(config.model, config.revision or None))
    if limit is None or config.max_context <= limit:
        return config.max_context
    if "max_context" in config.model_fields_set:
        raise ConfigError(
            f"max_context is {config.max_context}, and the model {config.model!r} has {limit} "
            "positions: take no more than that, or a model with more"
        )
    log.info("max_context is %d: the model has no more positions", limit)
    return limit


def _check_torch_device(device: str) -> None:
    """Raises ConfigError for a device that torch does not find."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', and torch finds no CUDA device here: take 'cpu' or 'auto', or "
            "install the extra `cuda` on a machine with an NVIDIA driver"
        )


def check_devices(config: TeacherConfig) -> None:
    """That vLLM's engine can have the cores or GPUs that it is to have, and the model be cut for
    them. Raises ConfigError, and EngineError for a model whose configuration cannot be read."""
    sizes = {
        name: getattr(config, name)
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    }
    num_devices = prod(sizes.values())
    if config.executor == "ray" and find_spec("ray") is None:
        raise ConfigError(
            "executor is 'ray', and Ray is not installed here: install the package `ray` on every "
            "node of the cluster, and start it there (`ray start`)"
        )
    try:
        num_gpus = _check_spread(config, sizes) if num_devices > 1 else 0
        # On a GPU every process has the same cores.
        check_cores(config.cpu_cores, 1 if num_gpus else num_devices)
    except DevicesError as error:
        raise ConfigError(str(error)) from error
    except CoresError as error:
        raise ConfigError(f"cpu_cores is {config.cpu_cores!r}, which {error}") from error


def _check_spread(config: TeacherConfig, sizes: Mapping[str, int]) -> int:
    """The GPUs that there are, enough for these sizes; 0 on a CPU. Raises ConfigError,
    DevicesError, EngineError."""
    import torch

    from teacher_server.engine.checkpoint import read_config

    text = read_config(config.model, config.revision or None).get_text_config(decoder=True)
    for check, (name, size) in zip(
        (check_tensor_parallel, check_pipeline_parallel, check_data_parallel),
        sizes.items(),
        strict=True,
    ):
        check(name, size, text)
    if num_gpus := torch.cuda.device_count():
        if config.executor == "auto":  # Ray's cluster has more than this host
            check_gpus(sizes, num_gpus)
    elif config.enforce_eager and config.pipeline_parallel_size > 1:
        raise ConfigError(
            f"enforce_eager is True with pipeline_parallel_size {config.pipeline_parallel_size} on "
            "a CPU, where vLLM 0.32 makes room for what passes between stages only when it "
            "compiles: leave enforce_eager out"
        )
    return num_gpus


def load_tokenizer(config: TeacherConfig) -> Any:
    """The tokenizer of the checkpoint, or None for a fake engine without one."""
    name = config.tokenizer or config.model
    if not name:
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    # A commit of the checkpoint is none of another's.
    revision = "main" if config.tokenizer else config.revision or "main"
    file = cached_file(
        name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return faithful(
        AutoTokenizer.from_pretrained(name, revision=revision),
        Path(file) if file else None,
        lambda: PreTrainedTokenizerFast.from_pretrained(name, revision=revision),
    )


def end_token_ids(config: TeacherConfig, tokenizer: Any) -> tuple[int, ...]:
    """The end token of the tokenizer, and those of the generation_config, where there is one."""
    from transformers import GenerationConfig

    own = None
    with suppress(OSError):
        own = GenerationConfig.from_pretrained(
            config.model, revision=config.revision or "main"
        ).eos_token_id
    return united(tokenizer.eos_token_id, own)


def describe(config: TeacherConfig, engine: ScoringEngine, tokenizer: Any) -> TeacherInfo:
    """What clients are told. Reads every weight file of a local checkpoint for its digest."""
    served = engine.info
    folder = Path(config.model)
    is_local = config.model and folder.is_dir()
    vocabulary = Vocabulary() if tokenizer is None else Vocabulary.of(tokenizer)
    return TeacherInfo(
        model_id=config.model or f"fake-{served.vocab_size}",
        revision=config.revision,
        weights_digest=weights_digest(folder) if is_local else "",
        dtype=served.dtype,
        vocab_size=served.vocab_size,
        tokenizer_fingerprint=vocabulary.fingerprint or fake_fingerprint(served.vocab_size),
        special_token_ids=tuple(sorted(tokenizer.all_special_ids)) if tokenizer else (),
        max_k=served.max_k,
        max_context=served.max_context,
        engine=served.name,
        engine_version=served.version,
        instance_id=uuid.uuid4().hex,
        max_sessions=config.max_sessions,
        max_append_tokens=config.max_append_tokens,
        server_version=__version__,
        block_tokens=served.block_tokens,
        end_token_ids=end_token_ids(config, tokenizer) if tokenizer else (),
        token_digests=vocabulary.digests,
    )
