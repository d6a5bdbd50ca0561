"""Scored rollouts, one after another, and a step's worth ahead of the learner. Only in here is the
teacher asked.

Generation and scoring run on one asyncio loop in a thread of its own; the learner's thread takes
finished rollouts in the order of their prompts. Depth 0 generates when it is asked; depth 1 keeps
as many under way as a step takes while the learner works, with weights one optimiser step old.
Deeper is no faster: rollouts that wait to be learnt from only grow older. Knows no model.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import uvloop

from student_trainer.data import PromptOrder
from student_trainer.records import Prompt, Rollout, SamplingOptions
from student_trainer.rollouts.budget import LengthBudget
from student_trainer.rollouts.rollout import RolloutRules, TeacherSession, run_rollout
from student_trainer.rollouts.samplers.base import Sampler
from teacher_wire import tracing

T = TypeVar("T")
OpenSession: TypeAlias = Callable[[Prompt], TeacherSession]
"""A session at the teacher of a prompt, given what that teacher is to see of it."""
CLOSE_TIMEOUT_S = 5.0
SIGNAL_POLL_S = 0.5


def wait_until_settled(futures: Sequence[Future[Any]]) -> None:
    """Returns once all have ended, or one has failed.

    It wakes up now and then: a signal that comes just before the thread sleeps, or that another
    thread takes, does not wake it, and Python handles none before it does.
    """
    while True:
        ended, others = wait(futures, SIGNAL_POLL_S, return_when=FIRST_EXCEPTION)
        if not others or any(f.cancelled() or f.exception() is not None for f in ended):
            return


class LoopThread:
    """One asyncio loop in a thread; the only place where sampler and teacher client live."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begins a coroutine and returns at once."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine; an interrupt here cancels it."""
        future = self.start(work)
        try:
            wait_until_settled([future])
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancels what still runs, stops the loop and frees it."""
        with suppress(TimeoutError):
            self.start(_cancel_all()).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What the loop got when it asked for rollouts."""

    rollouts: list[Rollout]
    """Empty when the teacher stayed away all through."""
    num_unscored: int
    """Rollouts that the teacher scored nothing of; they are not in the list."""


class RolloutStream:
    """The rollouts of a run, from the first step on: `rollouts_per_prompt` of each prompt."""

    def __init__(
        self,
        *,
        loop: LoopThread,
        sampler: Sampler,
        open_session: OpenSession,
        prompts: PromptOrder,
        rules: Mapping[str | None, RolloutRules],
        budget: LengthBudget,
        options: Callable[[int], SamplingOptions],
        rollouts_per_prompt: int,
        queue_depth: int,
        seed: int,
        num_steps: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """`options` are those of a rollout, given the most tokens that it may have.

        `rules` are those of each teacher, by what a prompt calls it.
        """
        self._loop = loop
        self._sampler = sampler
        self._open_session = open_session
        self._prompts = prompts
        self._rules = rules
        self.budget = budget
        """How long the next rollouts may be; the loop tells it what came of the last."""
        self._options = options
        self._rollouts_per_prompt = rollouts_per_prompt
        self.rollouts_per_step = prompts.prompts_per_step * rollouts_per_prompt
        self._num_ahead = queue_depth * self.rollouts_per_step
        self._seed = seed
        self._num_steps = num_steps
        self._progress = progress
        self._under_way: deque[Future[Rollout | None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._finished: Counter[int] = Counter()
        self._num_taken = self._num_settled = 0
        self._coming = self._from_step(0)
        self.policy_version = 0
        """Optimiser rounds of the weights in the sampler; set after a sync."""

    def take(self, count: int) -> Taken:
        """The next `count` rollouts; fewer at the end of the run.

        Raises what a rollout raised, TeacherError say, after the others were cancelled.
        """
        self._launch(count - len(self._under_way))
        futures = [*islice(self._under_way, count)]
        outcomes = self._results(futures)
        for _ in futures:
            self._under_way.popleft()
        self._num_taken += len(futures)
        self._launch(self._num_ahead - len(self._under_way))
        rollouts = [rollout for rollout in outcomes if rollout is not None]
        return Taken(rollouts=rollouts, num_unscored=len(outcomes) - len(rollouts))

    def settle(self) -> None:
        """What was taken so far is learnt from: a resumed run begins after it."""
        self._num_settled = self._num_taken

    def wait_until_idle(self) -> None:
        """Returns once nothing is being generated: weights may be replaced."""
        self._results(self._under_way)

    def close(self) -> None:
        """Ends what is under way; waits a little for a teacher that no longer answers."""
        with suppress(TimeoutError):
            self._loop.start(_cancel(self._tasks)).result(CLOSE_TIMEOUT_S)
        self._under_way.clear()

    def state(self) -> dict[str, Any]:
        """How many steps' rollouts were learnt from; the others are generated again."""
        return {"steps": self._num_settled // self.rollouts_per_step}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on after so many steps, with weights of as many versions."""
        self.policy_version = state["steps"]
        self._num_taken = self._num_settled = state["steps"] * self.rollouts_per_step
        self._coming = self._from_step(state["steps"])

    def _from_step(self, first_step: int) -> Iterator[tuple[int, int, Prompt]]:
        """Step, index within the step, and prompt of every rollout that is still to come."""
        for step in range(first_step, self._num_steps):
            prompts = self._prompts.step(step)
            repeated = (prompt for prompt in prompts for _ in range(self._rollouts_per_prompt))
            for index, prompt in enumerate(repeated):
                yield step, index, prompt

    def _launch(self, count: int) -> None:
        options = self._options(self.budget.max_tokens)
        for step, index, prompt in islice(self._coming, max(0, count)):
            seeded = replace(options, seed=_seed(self._seed, step, index))
            work = self._rollout(step, index, prompt, seeded, self.policy_version)
            self._under_way.append(self._loop.start(work))

    def _results(self, futures: Iterable[Future[Rollout | None]]) -> list[Rollout | None]:
        futures = list(futures)
        try:
            wait_until_settled(futures)
            failed = [f for f in futures if f.done() and f.exception() is not None]
            return [future.result() for future in failed or futures]
        except Exception:
            self.close()
            raise

    async def _rollout(
        self, step: int, index: int, prompt: Prompt, options: SamplingOptions, version: int
    ) -> Rollout | None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with tracing.span("rollout", step=step, index=index):
                rollout = await run_rollout(
                    prompt,
                    request_id=f"step{step}-{index}",
                    options=options,
                    sampler=self._sampler,
                    session=self._open_session(prompt),
                    rules=self._rules[prompt.teacher],
                    policy_version=version,
                )
        finally:
            self._tasks.discard(task)
        self._finished[step] += 1
        self._progress(self._finished[step], self.rollouts_per_step)
        return rollout


async def _cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)  # each leaves the set of its owner when it ends
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _cancel_all() -> None:
    """All that runs on this loop but this."""
    await _cancel(asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())})


def _seed(run_seed: int, step: int, index: int) -> int:
    """A seed of 31 bits for one rollout, the same in every run with this run seed."""
    return int(np.random.SeedSequence((run_seed, step, index)).generate_state(1)[0] >> 1)
