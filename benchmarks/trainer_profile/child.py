"""A trainer that takes a step when it is asked to, and says when it was doing what.

    python -m benchmarks.trainer_profile.child CONFIG [KEY=VALUE ...]

answers each question {"do": "step"} with one step, of "rollouts" and "max_tokens" where it says so:
spans of the monotonic clock by phase, seconds of the learner by part, tokens, and what its threads
are called; one JSON object a line. {"do": "rollout"} takes rollouts and learns nothing; {"do":
"idle", "seconds": ...} waits.
"""

# ruff: noqa: E402 - how threads wait is said before torch is loaded, as the command line does

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from vllm_process.cores import wait_briefly

wait_briefly()

import torch

from benchmarks.processes import answer_lines
from student_trainer import train
from student_trainer.assembly.run import Run, assembled
from student_trainer.learner import batch, head, learner
from student_trainer.learner.optim import Optimizer
from student_trainer.recording.phase_clock import PhaseClock
from student_trainer.rollouts.budget import FixedBudget
from student_trainer.settings.budget import FixedBudgetSettings
from student_trainer.settings.config import load_config

PROBE = "probe"
SEAMS: tuple[tuple[object, str, str], ...] = (
    (learner, "collate", "rollouts to tensors"),
    (batch.Batch, "forward", "forward"),
    (head._Blocks, "first_pass", "head, first pass"),
    (batch.Batch, "loss_inputs", "losses"),
    (learner, "objective", "losses"),
    (torch.Tensor, "backward", "backward"),
    (head._Blocks, "second_pass", "head, second pass"),
    (Optimizer, "step", "optimiser"),
)
"""Where the learner's stopwatches are: owner, name, part."""


class Spans:
    """What took place from when to when, and for how long in all."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float, float]] = []
        self.parts: dict[str, float] = {}
        self.probe_began: float | None = None

    def forget(self) -> None:
        self.phases, self.parts, self.probe_began = [], {}, None

    def time_calls(self, owner: object, name: str, part: str) -> None:
        """Of a function, from now on."""
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            try:
                return call(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.monotonic() - started

        setattr(owner, name, timed)

    def note_probe(self, run: Run) -> None:
        """When the sampler is first asked for a token of the probe, from now on."""
        generate = run.running.sampler.generate

        def noted(request_id: str, *args: Any) -> Any:
            if request_id.startswith(PROBE) and self.probe_began is None:
                self.probe_began = time.monotonic()
            return generate(request_id, *args)

        run.running.sampler.generate = noted  # type: ignore[method-assign]

    def clock(self) -> type[PhaseClock]:
        """In place of the loop's clock."""
        spans = self

        class Noted(PhaseClock):
            @contextmanager
            def phase(self, name: str) -> Iterator[None]:
                started = time.monotonic()
                with super().phase(name):
                    yield
                spans.phases.append((name, started, time.monotonic()))

        return Noted

    def told(self) -> list[tuple[str, float, float]]:
        """The phases, and within the sync the probe apart."""
        found = []
        for name, start, end in self.phases:
            if name == "sync" and self.probe_began is not None:
                found += [(name, start, self.probe_began), (PROBE, self.probe_began, end)]
            else:
                found.append((name, start, end))
        return found

    def learner_parts(self) -> dict[str, float]:
        """Seconds that are nobody else's: what is called from within is taken off."""
        parts = dict(self.parts)
        first, second = parts.get("head, first pass", 0.0), parts.get("head, second pass", 0.0)
        parts["body, forward"] = parts.pop("forward", 0.0) - first
        parts["body, backward"] = parts.pop("backward", 0.0) - second
        return parts


def step(run: Run, question: dict[str, Any]) -> dict[str, Any]:
    """A whole one, of as many rollouts and tokens as are asked for."""
    stream = run.stream
    stream.rollouts_per_step = int(question.get("rollouts", stream.rollouts_per_step))
    if "max_tokens" in question:
        settings = FixedBudgetSettings(max_tokens=int(question["max_tokens"]))
        stream.budget = FixedBudget(settings)
    report = train.take_step(run, run.state.step)
    run.stream.settle()
    run.state.step = report.step
    generation = report.generation
    assert generation is not None
    return {"generated": generation.generated_tokens, "kept": generation.kept_tokens}


def rollout(run: Run, _: dict[str, Any]) -> dict[str, Any]:
    """Its first phase alone."""
    taken = run.stream.take(run.stream.rollouts_per_step).rollouts
    generated = sum(rollout.num_generated for rollout in taken)
    return {"generated": generated, "kept": sum(len(rollout) for rollout in taken)}


def idle(_: Run, question: dict[str, Any]) -> dict[str, Any]:
    """Nothing."""
    time.sleep(question["seconds"])
    return {}


ACTIONS = {"step": step, "rollout": rollout, "idle": idle}


@asynccontextmanager
async def stepping(
    config: Path, overrides: list[str]
) -> AsyncIterator[Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]:
    """A run that is ready, as a function of questions."""
    spans = Spans()
    with assembled(load_config(config, overrides), overwrite=True) as run:
        for seam in SEAMS:
            spans.time_calls(*seam)
        spans.note_probe(run)
        train.PhaseClock = spans.clock()  # type: ignore[misc]

        async def answer(question: dict[str, Any]) -> dict[str, Any]:
            spans.forget()
            began = time.monotonic()
            figures = ACTIONS[question["do"]](run, question)
            return figures | {
                "began": began,
                "ended": time.monotonic(),
                "phases": spans.told() or [(question["do"], began, time.monotonic())],
                "parts": spans.learner_parts(),
                "threads": {str(each.native_id): each.name for each in threading.enumerate()},
            }

        yield answer


if __name__ == "__main__":
    asyncio.run(answer_lines(stepping(Path(sys.argv[1]), sys.argv[2:])))
