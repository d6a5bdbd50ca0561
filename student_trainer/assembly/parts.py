"""The large parts of a run, each from how the run begins: learner, sampler, stream of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.assembly import (
    adapting,
    checkpoints,
    from_settings,
    methods,
    syncing,
    teachers,
)
from student_trainer.assembly.metering import metered
from student_trainer.assembly.restarting import replaceable
from student_trainer.assembly.sampling import RunningSampler, SamplerStart, begun
from student_trainer.data import PromptOrder
from student_trainer.learner.learner import Learner
from student_trainer.learner.sharding import shard
from student_trainer.learner.student import response_logprobs
from student_trainer.pretrained import load_student
from student_trainer.process.ranks import Ranks
from student_trainer.process.stopping import StopRequest
from student_trainer.recording.terminal import Bars
from student_trainer.records import Prompt
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.stream import LoopThread, RolloutStream
from student_trainer.saved_student import check_saveable
from student_trainer.settings.config import TrainerConfig
from student_trainer.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from student_trainer.recording.metrics import TrainerMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a run begins."""

    config: TrainerConfig
    goes_on: checkpoints.GoesOn | None
    """From a checkpoint; None for one that begins."""
    replaces: bool
    """An earlier run in its folder."""
    running: RunningSampler | None
    """A sampler that is there already."""
    stop: StopRequest
    ranks: Ranks
    metrics: TrainerMetrics | None = None
    """Those that Prometheus asks for, where it may."""

    @property
    def checkpoint(self) -> Path | None:
        """It goes on from there."""
        return None if self.goes_on is None else self.goes_on.checkpoint

    @property
    def model(self) -> str:
        """What learner and sampler load."""
        return adapting.model_of(self.config, self.checkpoint)

    @property
    def shares_weights(self) -> bool:
        """Whether the sampler generates with the learner's own model."""
        alone = self.running is None and self.ranks.world == 1
        return alone and from_settings.shares_weights(self.config)


def learner(
    start: Start, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> Learner:
    """The student under training. Raises CheckpointError, ConfigError."""
    config = start.config
    weights = methods.weights(config, newline_ids=from_settings.newline_ids(config, tokenizer))
    torch.manual_seed(config.run.seed)
    dtype = from_settings.dtype(config)
    model = load_student(
        start.model,
        # A base that stays as it is need not be held in more than it is computed in.
        dtype=torch.float32 if config.student.lora is None else dtype,
        device=from_settings.device(config),
        attention=config.student.attention,
        gradient_checkpointing=config.student.gradient_checkpointing,
        computes_in=dtype,
    )
    if mended := check_saveable(model, tokenizer, start.model):
        say(mended)
    adapter = adapting.adapter(config, model, start.checkpoint)
    shard(model, response_logprobs)
    return Learner(
        model,
        tokenizer,
        from_settings.optimizer(config, model),
        divergence=methods.divergence(config),
        weights=weights,
        epochs=config.optim.epochs,
        updates_per_epoch=config.optim.updates_per_epoch,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
        dtype=dtype,
        recomputes_behavior=config.needs_learner_behavior,
        stop_ids=from_settings.stop_ids(config, start.model, tokenizer),
        stop=start.stop,
        copied_to=getattr(torch, from_settings.sampler_dtype(config)),
        adapter=adapter,
        mass_outside=config.loss.needs.mass_outside,
        num_steps=config.run.steps,
        say=say,
    )


def sampler(
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    loop: LoopThread,
    bars: Bars,
    stack: ExitStack,
    lent: PreTrainedModel | None,
) -> tuple[Sampler, SamplerStart | None]:
    """What generates, begun; with a model that is lent to it, where it can do without its own."""
    if start.running is not None:
        return start.running.sampler, None
    made = replaceable(start.config, start.model, tokenizer, lent)
    return made, stack.enter_context(begun(start.config, made, loop, bars))


def stream(
    start: Start,
    prompts: list[Prompt],
    specials: SpecialTokens,
    running: RunningSampler,
    asked: teachers.Teachers,
    bars: Bars,
) -> RolloutStream:
    """The rollouts, scored."""
    config = start.config
    return RolloutStream(
        loop=running.loop,
        sampler=running.sampler,
        open_session=metered(teachers.sessions(config, asked), start.metrics, asked),
        prompts=PromptOrder(
            prompts, prompts_per_step=config.rollout.prompts_per_step, seed=config.run.seed
        ),
        rules=teachers.rules(config, specials, asked),
        budget=methods.budget(config),
        options=lambda max_tokens: from_settings.sampling_options(
            config, max_tokens, asked.excluded_ids
        ),
        rollouts_per_prompt=config.rollout.rollouts_per_prompt,
        max_staleness=config.rollout.max_staleness,
        tokens_per_step=config.rollout.tokens_per_step,
        seed=config.run.seed,
        num_steps=config.run.steps,
        progress=lambda done, total: bars.update("rollouts", done, total),
        ranks=start.ranks,
        stop=start.stop,
    )


def warnings(
    start: Start,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    asked: teachers.Teachers,
) -> Iterator[str]:
    """What to know of this run before its first step."""
    yield from checkpoints.warnings(start.config, learner)
    yield from syncing.warnings(start.config, learner)
    yield from teachers.warnings(start.config, start.model, tokenizer, asked)
