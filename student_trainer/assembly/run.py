"""Puts a run together from its configuration: the only place that knows every part.

Order matters: what is cheap and can refuse comes first (data, tokenizer, handshake with the
teacher), then the learner, and the sampler, which takes tens of seconds, last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.assembly import methods, parts
from student_trainer.data import PromptOrder, load_tokenizer
from student_trainer.eval import EvalResult, evaluate
from student_trainer.learner.checkpoint import Checkpoints, load_state, save_student
from student_trainer.learner.optim import Optimizer
from student_trainer.learner.student import load_student
from student_trainer.losses import Divergence, PositionWeight
from student_trainer.recording.run_log import Bars, RunLog
from student_trainer.records import Prompt
from student_trainer.rollouts.budget import LengthBudget
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.stream import LoopThread, RolloutSource
from student_trainer.rollouts.weight_sync import WeightSync
from student_trainer.settings.config import TrainerConfig

NUM_PROBE_PROMPTS = 2


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything the loop uses."""

    config: TrainerConfig
    device: torch.device
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: Optimizer
    divergence: Divergence
    weights: list[PositionWeight]
    budget: LengthBudget
    source: RolloutSource
    loop: LoopThread
    sampler: Sampler
    sync: WeightSync
    probe_prompts: list[NDArray[np.int32]]
    heldout: list[Prompt]
    checkpoints: Checkpoints
    log: RunLog
    bars: Bars
    first_step: int

    @property
    def overlap_k(self) -> int | None:
        """Entries compared by the overlap; None when no candidates are sent."""
        return self.config.drift.k if self.config.rollout.student_topk > 0 else None

    def push_weights(self, version: int) -> float:
        """Moves the learner's weights into the sampler; returns the log-prob gap, in nats."""
        gap = self.loop.run(self.sync.push(self.probe_prompts, version))
        self.source.policy_version = version
        return gap

    def evaluation_due(self, step: int) -> bool:
        """After every so many steps and after the last."""
        every, last = self.config.eval.every_steps, self.config.run.steps
        return bool(self.heldout) and (step % every == 0 or step == last)

    def evaluate(self, step: int) -> EvalResult:
        """Greedy accuracy of the sampler's weights; the first and the last time also pass@k."""
        settings = self.config.eval
        ends = step in (0, self.config.run.steps)
        self.source.wait_until_idle()
        result = self.loop.run(
            evaluate(
                self.sampler,
                self.heldout,
                parts.grader(self.config),
                self.tokenizer,
                name=f"step{step}",
                max_tokens=settings.max_tokens,
                num_samples=settings.pass_k if ends else 0,
                temperature=settings.temperature,
                progress=lambda done, total: self.bars.update("evaluation", done, total),
            )
        )
        self.log.evaluation(
            step,
            {
                "accuracy": result.accuracy,
                "pass_at_1": result.pass_at_1,
                "pass_at_k": result.pass_at_k,
                "mean_tokens": result.mean_tokens,
            },
        )
        return result

    def checkpoint_due(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return every is not None and step % every == 0

    def save_checkpoint(self, step: int) -> None:
        """Everything a resumed run needs."""
        state = {"optimizer": self.optimizer.state_dict(), "budget": self.budget.state_dict()}
        self.checkpoints.save(step, self.student, self.tokenizer, state)

    def save_student(self) -> None:
        """The trained student, in Hugging Face format."""
        save_student(self.config.run.out / "student", self.student, self.tokenizer)


@dataclass(frozen=True, slots=True)
class RunningSampler:
    """A started engine and the loop it lives on; several runs may use it, one after another."""

    loop: LoopThread
    sampler: Sampler


@contextmanager
def started_sampler(config: TrainerConfig, model: str, loop: LoopThread) -> Iterator[Sampler]:
    """The engine that generates, with the weights of a checkpoint; tens of seconds."""
    sampler = parts.sampler(config, model)
    try:
        loop.run(sampler.start())
        yield sampler
    finally:
        loop.run(sampler.close())


@contextmanager
def running_sampler(config: TrainerConfig, model: str) -> Iterator[RunningSampler]:
    """A sampler on a loop of its own, for several runs or none."""
    with closing(LoopThread()) as loop, started_sampler(config, model, loop) as sampler:
        yield RunningSampler(loop, sampler)


@contextmanager
def assembled(
    config: TrainerConfig, *, resume: bool = False, running: RunningSampler | None = None
) -> Iterator[Run]:
    """A run ready for its first step; ends everything it started when the block is left.

    A sampler that is `running` already is given the run's weights and left running.
    """
    with ExitStack() as stack:
        tokenizer = load_tokenizer(config.student.model)
        train_prompts, heldout = parts.prompts(config, tokenizer)
        specials = parts.special_tokens(config, tokenizer)
        newline_ids = parts.newline_ids(config, tokenizer)
        checkpoints = Checkpoints(config.run.out / "checkpoints", keep=config.checkpoint.keep)
        if not resume:
            checkpoints.refuse_older()
        start_from = str(checkpoints.latest()) if resume else config.student.model
        device = parts.device(config)
        torch.manual_seed(config.run.seed)
        student = load_student(
            start_from, dtype=getattr(torch, config.student.dtype), device=device
        )

        loop = running.loop if running else stack.enter_context(closing(LoopThread()))
        client = loop.run(parts.connect(config, student.config.vocab_size, tokenizer))
        stack.callback(lambda: loop.run(client.aclose()))
        bars = stack.enter_context(Bars())
        optimizer = parts.optimizer(config, student)
        budget = methods.budget(config)
        first_step = 0
        if resume:
            state = load_state(checkpoints.latest())
            optimizer.load_state_dict(state["optimizer"])
            budget.load_state_dict(state["budget"])
            first_step = state["step"]
        log = RunLog(config.run.out, bars, resume_from=first_step if resume else None)
        stack.callback(log.close)

        bars.update("sampler", 0, 1, f"starting {config.sampler.kind}")
        sampler = (
            running.sampler
            if running
            else stack.enter_context(started_sampler(config, start_from, loop))
        )
        bars.update("sampler", 1, 1, "ready")
        sync = WeightSync(student, sampler, max_logprob_gap=config.optim.max_sync_gap_nats)
        stack.callback(sync.close)
        probe_prompts = [p.token_ids for p in train_prompts[:NUM_PROBE_PROMPTS]]
        if running:
            loop.run(sync.push(probe_prompts, first_step))
        options, policy = parts.score_options(config), parts.drift_policy(config)
        source = RolloutSource(
            loop=loop,
            sampler=sampler,
            open_session=lambda prompt_ids: client.open(prompt_ids, options, policy),
            prompts=PromptOrder(
                train_prompts,
                prompts_per_step=config.rollout.prompts_per_step,
                seed=config.run.seed,
            ),
            rules=parts.rollout_rules(config, specials, client.info),
            options=lambda: parts.sampling_options(config, budget.max_tokens),
            rollouts_per_prompt=config.rollout.rollouts_per_prompt,
            queue_depth=config.run.queue_depth,
            seed=config.run.seed,
            first_step=first_step,
            end_step=config.run.steps,
            progress=lambda done, total: bars.update("rollouts", done, total),
        )
        stack.callback(source.close)
        yield Run(
            config=config,
            device=device,
            student=student,
            tokenizer=tokenizer,
            optimizer=optimizer,
            divergence=methods.divergence(config),
            weights=methods.weights(config, newline_ids=newline_ids),
            budget=budget,
            source=source,
            loop=loop,
            sampler=sampler,
            sync=sync,
            probe_prompts=probe_prompts,
            heldout=heldout,
            checkpoints=checkpoints,
            log=log,
            bars=bars,
            first_step=first_step,
        )


def evaluate_checkpoint(config: TrainerConfig, model: str) -> dict[str, float | int | None]:
    """Exact match and pass@k of any checkpoint on the held-out problems, without a teacher."""
    with ExitStack() as stack:
        tokenizer = load_tokenizer(model)
        _, heldout = parts.prompts(config, tokenizer)
        running = stack.enter_context(running_sampler(config, model))
        progress = stack.enter_context(Bars())
        result = running.loop.run(
            evaluate(
                running.sampler,
                heldout,
                parts.grader(config),
                tokenizer,
                name="checkpoint",
                max_tokens=config.eval.max_tokens,
                num_samples=config.eval.pass_k,
                temperature=config.eval.temperature,
                progress=lambda done, total: progress.update("evaluation", done, total),
            )
        )
    return asdict(result)
