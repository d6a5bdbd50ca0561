"""Our trainer on one task, a teacher being up: the product's own parts and its own step.

    python -m benchmarks.trainers.driftline_child TASK

The body of the loop is that of student_trainer/train.py, with a clock around it; the student is
saved off the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.provenance import versions
from benchmarks.trainers.task import Task, Tell, prompts_digest, telling
from student_trainer.settings.config import TrainerConfig, load_config
from vllm_process.cores import wait_briefly

if TYPE_CHECKING:
    from student_trainer.assembly.run import Run
    from student_trainer.records import Delta
    from student_trainer.rollouts.stream import Taken


def tell_first_token(run: Run, tell: Tell) -> None:
    """Of the first rollout."""
    sampler: Any = run.running.sampler
    generate, told = sampler.generate, False

    async def watched(*arguments: Any) -> AsyncIterator[Delta]:
        nonlocal told
        async for delta in generate(*arguments):
            if not told and len(delta):
                told = True
                tell("first_token")
            yield delta

    sampler.generate = watched


def figures_of_rollouts(run: Run) -> dict[str, Any]:
    """Filled at every step with what its rollouts were."""
    stream: Any = run.stream
    take = stream.take
    figures: dict[str, Any] = {}

    def watched(count: int) -> Taken:
        taken: Taken = take(count)
        rollouts = taken.rollouts
        figures.update(
            rollouts=len(rollouts),
            generated_tokens=sum(rollout.num_generated for rollout in rollouts),
            longest=max(rollout.num_generated for rollout in rollouts),
            prompt_tokens=sum(len(rollout.prompt.token_ids) for rollout in rollouts),
            prompts=prompts_digest([rollout.prompt.token_ids.tolist() for rollout in rollouts]),
        )
        return taken

    stream.take = watched
    return figures


def trained(run: Run, task: Task, tell: Tell) -> None:
    """Every step, and a line of each."""
    from student_trainer.train import take_step

    figures = figures_of_rollouts(run)
    for step in range(task.steps):
        started = time.perf_counter()
        report = take_step(run, step)
        run.stream.settle()
        run.state.step = report.step
        run.recorder.step(report)
        seconds = time.perf_counter() - started
        learning, spent = report.learning, report.seconds
        assert learning is not None
        phases = {
            "generate": spent.generate or 0.0,
            "teacher": spent.teacher_wait or 0.0,
            "learn": spent.learn or 0.0,
            "sync": spent.sync or 0.0,
            "other": seconds - spent.total,
        }
        tell(
            "step",
            step=report.step,
            seconds=seconds,
            phases=phases,
            loss_tokens=round(learning.loss_tokens),
            learning_rate=learning.learning_rate,
            updates=learning.updates,
            loss=learning.loss,
            **figures,
        )
        if report.step in task.save_at:
            run.learner.save(task.saved(report.step))


def settings(config: TrainerConfig) -> dict[str, Any]:
    """What the run went by."""
    import torch

    from student_trainer.assembly import from_settings

    name = str(from_settings.dtype(config)).removeprefix("torch.")
    return {
        "versions": versions(),
        "max_tokens": config.longest_response,
        "temperature": config.rollout.temperature,
        "temperature_of_loss": config.rollout.temperature,
        "top_p": config.rollout.top_p,
        "dtype": name,
        "sampler_dtype": from_settings.sampler_dtype(config),
        "betas": list(config.optim.betas),
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.max_grad_norm,
        "updates_a_step": config.optim.epochs * config.optim.updates_per_epoch,
        "loss": config.loss.name,
        "gradient_checkpointing": config.student.gradient_checkpointing,
        "stop_in_flight": config.drift.stop_in_flight,
        "sampler": config.sampler.model_dump(mode="json"),
        "teacher_k": config.teacher.k,
        "student_topk": config.rollout.student_topk,
        "max_staleness": config.rollout.max_staleness,
        "threads": torch.get_num_threads(),
        "device": str(from_settings.device(config)),
    }


def main() -> None:
    wait_briefly()  # as the command line does
    task = Task.read(Path(sys.argv[1]))
    with telling() as tell:
        config = load_config(Path(task.config), task.overrides)
        from transformers.utils import logging

        from student_trainer.assembly.run import assembled

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        with assembled(config, overwrite=True) as run:
            tell("ready")
            tell_first_token(run, tell)
            trained(run, task, tell)
            tell("done", settings=settings(config))


if __name__ == "__main__":
    main()
