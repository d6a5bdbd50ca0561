"""Settings to objects: each function reads what it needs of the settings and builds one thing."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.data import load_prompts
from student_trainer.errors import ConfigError
from student_trainer.learner.memory import free_memory, refuse_too_large
from student_trainer.learner.optim import Optimizer
from student_trainer.records import Prompt, SamplingOptions, WeightFormat
from student_trainer.rollouts.rollout import RolloutRules
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.sampler import HfSamplerSettings, VllmSamplerSettings
from student_trainer.special_tokens import SpecialTokens
from teacher_client.access import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, TeacherAccess
from teacher_client.client import TeacherClient
from teacher_wire.drift_metrics import METRICS
from teacher_wire.fingerprint import tokenizer_fingerprint
from teacher_wire.records import (
    DriftPolicy,
    LogprobDtype,
    ScoreOptions,
    TeacherInfo,
    flags_for,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """A tokenizer, and what it made of the data."""

    tokenizer: PreTrainedTokenizerBase
    train: list[Prompt]
    heldout: list[Prompt]
    """Those that are evaluated."""


def problems(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> Problems:
    """The problems of a run. Raises DatasetError."""
    room = config.rollout.max_context - config.longest_response
    train = load_prompts(config.data.train, tokenizer, max_prompt_tokens=room)
    heldout = heldout_problems(config, tokenizer)
    return Problems(tokenizer=tokenizer, train=train, heldout=heldout)


def heldout_problems(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The problems that are evaluated; none without data.heldout. Raises DatasetError."""
    if config.data.heldout is None:
        return []
    heldout = load_prompts(
        config.data.heldout,
        tokenizer,
        max_prompt_tokens=config.rollout.max_context - config.eval.max_tokens,
        answer_field=config.data.answer_field,
    )
    return heldout[: config.eval.num_prompts]


def special_tokens(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The masked tokens. Raises ConfigError for one that the tokenizer does not have."""
    ids = _token_ids("special_tokens.tokens", config.special_tokens.tokens, tokenizer)
    return SpecialTokens(ids, first_only=config.special_tokens.occurrences == "first")


def newline_ids(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a span of the gate; none unless its spans are those between newlines.

    Raises ConfigError for one that the tokenizer does not have, or when none holds a newline.
    """
    gate = config.weights.block_gate
    if gate is None or gate.granularity != "newline":
        return ()
    if gate.newline_tokens is not None:
        return _token_ids("weights.block_gate.newline_tokens", gate.newline_tokens, tokenizer)
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[token_id] for token_id in ids])
    found = tuple(i for i, text in zip(ids, texts, strict=True) if "\n" in text)
    if not found:
        raise ConfigError("weights.block_gate: no token of the vocabulary holds a newline")
    return found


def _token_ids(
    setting: str, tokens: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ConfigError(f"{setting}: {token!r} is not in the vocabulary")
    return tuple(vocabulary[token] for token in tokens)


def device(config: TrainerConfig) -> torch.device:
    """Where the learner runs. Raises ConfigError for a device that is not there."""
    name = config.student.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"student.device is {name!r}: {reason}") from None
    return torch.device(name)


def dtype(config: TrainerConfig) -> torch.dtype:
    """The learner's arithmetic."""
    found: torch.dtype = getattr(torch, config.student.dtype)
    return found


def check_memory(config: TrainerConfig, model: str) -> list[str]:
    """Raises ConfigError for a student that cannot fit where the learner runs, before it is loaded.

    Returns a warning for one that fits only with gradient checkpointing and is trained without.
    """
    where = device(config)
    if (free_bytes := free_memory(where)) is None:
        return []
    rollout, optim = config.rollout, config.optim
    rollouts = -(-rollout.prompts_per_step * rollout.rollouts_per_prompt // optim.updates_per_epoch)
    longest = rollout.max_context
    tight = refuse_too_large(
        model,
        free_bytes=free_bytes - _sampler_bytes(config, where),
        where="this machine" if where.type == "cpu" else str(where),
        dtype=dtype(config),
        optimizer=optim.kind,
        tokens=max(longest, min(optim.micro_batch_tokens, rollouts * longest)),
        longest=longest,
        gradient_checkpointing=config.student.gradient_checkpointing,
        device=where,
    )
    return [tight] if tight else []


def _sampler_bytes(config: TrainerConfig, where: torch.device) -> float:
    """What a sampler beside the learner, not started yet, will take of the same memory."""
    if not isinstance(config.sampler, VllmSamplerSettings):
        return 0.0
    if where.type == "cpu":
        return config.sampler.kv_cache_gib * 2**30
    if where.type == "cuda" and where.index in (None, 0):
        return config.sampler.gpu_memory_utilization * torch.cuda.mem_get_info(where)[1]
    return 0.0


async def connect(
    config: TrainerConfig, vocab_size: int, tokenizer: PreTrainedTokenizerBase
) -> TeacherClient:
    """A teacher that speaks of the same tokens and whose limits hold what the run asks for.

    Raises NotReadyError when none answers, FingerprintMismatchError or ConfigError when it does not
    fit, before any work is done.
    """
    client = await TeacherClient.connect(
        config.teacher.endpoints,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=vocab_size,
        run_id=config.run.out.name,
        connect_timeout_s=config.teacher.connect_timeout_s,
        on_absent="wait" if config.teacher.on_absent == "wait" else "fail",
        access=teacher_access(config),
    )
    try:
        check_limits(config, client.info)
    except ConfigError:
        await client.aclose()
        raise
    return client


def teacher_access(config: TrainerConfig) -> TeacherAccess:
    """Token and certificates; nothing is read yet but the environment."""
    token_file = os.environ.get(TOKEN_FILE_VARIABLE)
    return TeacherAccess(
        token_file=config.teacher.token_file or (Path(token_file) if token_file else None),
        token=os.environ.get(TOKEN_VARIABLE, ""),
        tls_ca=config.teacher.tls_ca,
        tls_cert=config.teacher.tls_cert,
        tls_key=config.teacher.tls_key,
    )


def check_limits(config: TrainerConfig, info: TeacherInfo) -> None:
    """Raises ConfigError for a setting beyond what the teacher serves."""
    asked = {
        "teacher.k": (config.teacher.k, info.max_k),
        "rollout.student_topk": (config.collected_topk, info.max_k),
        "rollout.max_context": (config.rollout.max_context, info.max_context),
        "rollout.chunk_tokens": (config.rollout.chunk_tokens, info.max_append_tokens),
    }
    for name, (value, limit) in asked.items():
        if value > limit:
            raise ConfigError(f"{name} is {value}, the teacher {info.model_id} allows {limit}")


def score_options(config: TrainerConfig) -> ScoreOptions:
    """What the teacher returns; at the student's temperature, so that both sides compare."""
    return ScoreOptions(
        k=config.teacher.k,
        temperature=config.rollout.temperature,
        logprob_dtype=LogprobDtype(config.teacher.logprob_dtype),
        **flags_for(config.loss.needs.teacher_columns),
    )


def drift_policy(config: TrainerConfig) -> DriftPolicy:
    """The rule that travels to the teacher with every session."""
    drift, kind = config.drift, METRICS[config.drift.metric]
    return DriftPolicy(
        metric=kind(**{field.name: getattr(drift, field.name) for field in fields(kind)}),
        w_drop=drift.w_drop,
        stop_in_flight=drift.stop_in_flight,
    )


def rollout_rules(
    config: TrainerConfig, specials: SpecialTokens, info: TeacherInfo
) -> RolloutRules:
    """What all rollouts of the run share."""
    return RolloutRules(
        chunk_tokens=config.rollout.chunk_tokens,
        max_span_tokens=info.max_append_tokens,
        block_tokens=max(1, info.block_tokens),
        specials=specials,
        finish_when_absent=config.teacher.on_absent == "finish_unscored",
    )


def sampling_options(config: TrainerConfig, max_tokens: int) -> SamplingOptions:
    """How the behavior policy samples, within the budget of the step."""
    return SamplingOptions(
        max_tokens=max_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        num_topk=config.collected_topk,
    )


def sampler_dtype(config: TrainerConfig) -> str:
    """Arithmetic of the sampler's copy of the student."""
    settings = config.sampler
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if isinstance(settings, HfSamplerSettings) else config.student.dtype


def weight_format(config: TrainerConfig) -> WeightFormat:
    """How weights are written for the sampler.

    vLLM on a CPU repacks the head when it loads, and from a file without it silently keeps the old
    one; on a GPU it was not tried. So a tied head is left out for the reference sampler alone.
    """
    is_vllm = not isinstance(config.sampler, HfSamplerSettings)
    return WeightFormat(dtype=sampler_dtype(config), with_tied_head=is_vllm)


def sampler(config: TrainerConfig, model: str) -> Sampler:
    """The generating engine, not started."""
    settings = config.sampler
    if isinstance(settings, HfSamplerSettings):
        return HfSampler(model=model, dtype=settings.dtype, device=device(config))
    return VllmSampler(
        model=model,
        dtype=sampler_dtype(config),
        max_context=config.rollout.max_context,
        max_num_topk=config.collected_topk,
        max_num_seqs=settings.max_num_seqs,
        stream_interval=settings.stream_interval,
        kv_cache_gib=settings.kv_cache_gib,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager,
        cpu_cores=settings.cpu_cores,
        seed=config.run.seed,
    )


def optimizer(config: TrainerConfig, model: PreTrainedModel) -> Optimizer:
    """AdamW over the whole run. Raises ConfigError for a kind that is not installed."""
    optim = config.optim
    updates_per_step = optim.epochs * optim.updates_per_epoch
    return Optimizer(
        model,
        learning_rate=optim.learning_rate,
        final_learning_rate=optim.final_learning_rate,
        warmup_updates=optim.warmup_steps * updates_per_step,
        total_updates=config.run.steps * updates_per_step,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        kind=optim.kind,
    )
