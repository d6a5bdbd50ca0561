"""Settings to objects: each function reads what it needs of the settings and builds one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.assembly import adapting, vllm_devices
from student_trainer.data import Limits, PromptFormat, RowFields, Source, load_prompts
from student_trainer.data.templates import template_of
from student_trainer.errors import ConfigError
from student_trainer.learner.memory import free_memory, refuse_too_large
from student_trainer.learner.optim import Optimizer
from student_trainer.pretrained import (
    load_generation_config,
    load_tokenizer,
    refuse_quantised,
)
from student_trainer.records import Prompt, SamplingOptions, WeightFormat
from student_trainer.rollouts.samplers.base import Passage, Sampler
from student_trainer.rollouts.samplers.hf_batched_sampler import HfBatchedSampler
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.samplers.stop_strings import StopStringSampler
from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
from student_trainer.rollouts.weight_buffer import WeightBuffer
from student_trainer.rollouts.weight_folder import WeightFolder
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.sampler import (
    HfBatchedSamplerSettings,
    HfSamplerSettings,
    VllmSamplerSettings,
)
from student_trainer.special_tokens import SpecialTokens
from student_trainer.stop_tokens import stop_token_ids
from teacher_wire.id_ranges import IdRanges

EXACT_GAP_NATS, ROUNDED_GAP_NATS = 1e-3, 0.5
"""What learner and sampler may be apart: both in float32 (below 1e-4 for small models of every
family), or not (SmolLM2-135M in bfloat16: 0.03 in the mean, 0.31 at most of 256 tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """A tokenizer, and what it made of the data."""

    tokenizer: PreTrainedTokenizerBase
    train: list[Prompt]
    heldout: list[Prompt]
    """Those that are evaluated."""

    @property
    def all(self) -> list[Prompt]:
        return self.train + self.heldout

    def decode(self, token_id: int) -> str:
        """Of one token."""
        return str(self.tokenizer.decode(token_id))


def problems(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> Problems:
    """The problems of a run. Raises DatasetError."""
    data = config.data
    train = _read(config, tokenizer, data.train, data.train_split, room=config.longest_response)
    heldout = heldout_problems(config, tokenizer)
    return Problems(tokenizer=tokenizer, train=train, heldout=heldout)


def heldout_problems(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The problems that are evaluated; none without data.heldout. Raises DatasetError."""
    data = config.data
    if data.heldout is None:
        return []
    room = config.eval.max_tokens
    return _read(config, tokenizer, data.heldout, data.heldout_split, room=room)[
        : config.eval.num_prompts
    ]


def _read(
    config: TrainerConfig, tokenizer: PreTrainedTokenizerBase, path: Path, split: str, *, room: int
) -> list[Prompt]:
    """Prompts that leave room for a response, with turns that have room in it."""
    return load_prompts(
        Source(path=path, subset=config.data.subset, split=split),
        tokenizer,
        max_prompt_tokens=config.rollout.max_context - room,
        max_response_tokens=room,
        form=prompt_format(config),
        limits=data_limits(config),
    )


def prompt_format(config: TrainerConfig) -> PromptFormat:
    """How a row becomes a prompt. Raises DatasetError for a chat template that cannot be read."""
    data = config.data

    def template(path: Path | None) -> str | None:
        return None if path is None else template_of(path)

    return PromptFormat(
        fields=RowFields(prompt=data.prompt_field, answer=data.answer_field),
        system=data.system,
        chat_template=template(data.chat_template),
        teacher_chat_template=template(data.teacher_chat_template),
        template_kwargs=data.chat_template_kwargs,
        add_bos=data.add_bos,
        final_assistant=data.final_assistant,
        teachers=config.teachers,
    )


def data_limits(config: TrainerConfig) -> Limits:
    """When too much of a data set is wanting."""
    return Limits(
        too_long=config.data.too_long,
        max_skipped_share=config.data.max_skipped_share,
        max_lossy_share=config.data.max_lossy_share,
    )


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
    # A dictionary of every token, made anew: not for none of them.
    vocabulary = tokenizer.get_vocab() if tokens else {}
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
        raise ConfigError(
            f"student.device is {name!r}: {reason}; take 'cpu' or 'auto', or give the process a "
            "GPU: `student-trainer doctor` tells what is seen"
        ) from None
    found = torch.device(name)
    if found.type == "cuda" and found.index is None:
        # By its number: other threads begin with the first one, whatever this process was given.
        found = torch.device("cuda", torch.cuda.current_device())
    return found


def dtype(config: TrainerConfig) -> torch.dtype:
    """The learner's arithmetic."""
    found: torch.dtype = getattr(torch, config.student.dtype)
    return found


def check_student(
    config: TrainerConfig, model: str, tell: Callable[[str], None] = lambda terms: None
) -> list[str]:
    """Raises ConfigError for a student that cannot fit where the learner runs, CheckpointError for
    one that is quantised, before it is loaded. `tell` is given the arithmetic.

    Returns a warning for one that fits only with gradient checkpointing and is trained without.
    """
    refuse_quantised(model)
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
        lora=adapting.shape_of(config),
        tell=tell,
    )
    return [tight] if tight else []


def _sampler_bytes(config: TrainerConfig, where: torch.device) -> float:
    """What a sampler beside the learner, not started yet, will take of the same memory."""
    if isinstance(config.sampler, HfSamplerSettings):
        return 0.0
    if isinstance(config.sampler, VllmSamplerSettings) and config.sampler.sleep_level:
        return 0.0  # it has none of it while the learner needs the most
    if where.type == "cpu" or isinstance(config.sampler, HfBatchedSamplerSettings):
        return config.sampler.kv_cache_gib * 2**30
    if where.type == "cuda" and (where.index or 0) < config.sampler.tensor_parallel_size:
        return config.sampler.gpu_memory_utilization * torch.cuda.mem_get_info(where)[1]
    return 0.0


def sampling_options(
    config: TrainerConfig, max_tokens: int, excluded_ids: IdRanges = ()
) -> SamplingOptions:
    """How the behavior policy samples, within the budget of the step."""
    return SamplingOptions(
        max_tokens=max_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        num_topk=config.collected_topk,
        excluded_ids=excluded_ids,
    )


def sampler_dtype(config: TrainerConfig) -> str:
    """Arithmetic of the sampler's copy of the student."""
    settings = config.sampler
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if isinstance(settings, HfSamplerSettings) else config.student.dtype


def max_sync_gap_nats(config: TrainerConfig) -> float:
    """Of the settings, or by the arithmetic: what is not float32 rounds."""
    if (chosen := config.optim.max_sync_gap_nats) is not None:
        return chosen
    both_exact = {config.student.dtype, sampler_dtype(config)} == {"float32"}
    return EXACT_GAP_NATS if both_exact else ROUNDED_GAP_NATS


def weight_format(config: TrainerConfig) -> WeightFormat:
    """How weights are written for the sampler: in its arithmetic, and a tied head once.

    vLLM reads checkpoints, and passes over what it does not know; the samplers over transformers
    have the learner's own names.
    """
    settings = config.sampler
    is_vllm = isinstance(settings, VllmSamplerSettings)
    adapter_alone = adapting.in_vllm(config) is not None
    by_gpu = isinstance(settings, VllmSamplerSettings) and settings.weight_transfer != "host"
    return WeightFormat(
        dtype=sampler_dtype(config),
        as_saved=is_vllm and not adapter_alone,
        adapter_alone=adapter_alone,
        device=str(device(config)) if by_gpu else "cpu",
        is_announced=by_gpu,
    )


def shares_weights(config: TrainerConfig) -> bool:
    """Whether the sampler of a run generates with the learner's own model."""
    settings = config.sampler
    return (
        isinstance(settings, HfBatchedSamplerSettings)
        and settings.weights != "copied"
        and config.why_not_shared is None
    )


def stop_ids(
    config: TrainerConfig, model: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Ids at which the rollouts of a student end. The generation_config of the student that is
    saved lists them as `eos_token_id`. Raises ConfigError, CheckpointError."""
    return stop_token_ids(tokenizer, load_generation_config(model), config.rollout.stop_tokens)


def sampler(
    config: TrainerConfig,
    model: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shared: PreTrainedModel | None = None,
) -> Sampler:
    """The generating engine, not started; None for the checkpoint's own tokenizer. `shared` is the
    learner's own model of the checkpoint, where the sampler is to generate with that."""
    tokenizer = tokenizer or load_tokenizer(model)
    engine = _engine(config, model, stop_ids(config, model, tokenizer), shared)
    if not config.rollout.stop_strings:
        return engine

    def decoded(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    return StopStringSampler(engine, config.rollout.stop_strings, decoded)


def _engine(
    config: TrainerConfig, model: str, stop: tuple[int, ...], shared: PreTrainedModel | None
) -> Sampler:
    settings = config.sampler
    if isinstance(settings, HfBatchedSamplerSettings):
        return HfBatchedSampler(
            model=model if shared is None else shared,
            dtype=sampler_dtype(config),
            device=device(config),
            max_num_seqs=settings.max_num_seqs,
            stream_interval=settings.stream_interval,
            kv_cache_gib=settings.kv_cache_gib,
            cpu_threads=settings.cpu_threads,
            stop_ids=stop,
        )
    if isinstance(settings, HfSamplerSettings):
        return HfSampler(model=model, dtype=settings.dtype, device=device(config), stop_ids=stop)
    own = device(config)
    gpus = vllm_devices.gpus(settings, model, own)
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
        tensor_parallel_size=settings.tensor_parallel_size,
        gpus=gpus,
        seed=config.run.seed,
        stop_ids=stop,
        passage=passage(config, settings.weights_dir),
        adapter=(adapter := adapting.in_vllm(config)),
        transfer=vllm_devices.transfer(settings, own, gpus, adapter),
        sleep_level=vllm_devices.sleep_level(settings, own, gpus, adapter),
    )


def passage(config: TrainerConfig, weights_dir: Path | None) -> Passage:
    """How weights come into the engine's process. Raises ConfigError."""
    if adapting.in_vllm(config) is not None:
        return adapting.adapter_passage(config, weights_dir)
    return WeightBuffer() if weights_dir is None else WeightFolder(weights_dir)


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
