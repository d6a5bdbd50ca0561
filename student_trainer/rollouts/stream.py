"""Batches of scored rollouts, `queue_depth` steps ahead. Only in here is the teacher asked.

Generation and scoring run on one asyncio loop in a thread of its own; the learner's thread takes
finished batches. Depth 0 generates a batch when it is asked for one; depth n keeps n more under way
while the learner works, with weights that are up to n optimiser steps old. The loop is the same.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import uvloop
from numpy.typing import NDArray

from student_trainer.data import PromptOrder
from student_trainer.records import Prompt, Rollout, SamplingOptions
from student_trainer.rollouts.rollout import RolloutRules, TeacherSession, run_rollout
from student_trainer.rollouts.samplers.base import Sampler
from teacher_wire import tracing

T = TypeVar("T")
CLOSE_TIMEOUT_S = 5.0


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
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancels what still runs, stops the loop and frees it."""
        with suppress(TimeoutError):
            self.start(_cancel_others()).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """The rollouts of one step."""

    step: int
    rollouts: list[Rollout]
    """Empty when the teacher stayed away all through the step."""
    num_unscored: int
    """Rollouts that the teacher scored nothing of; they are not in the list."""


class RolloutSource:
    """An iterator of rollout batches, from `first_step` up to but without `end_step`."""

    def __init__(
        self,
        *,
        loop: LoopThread,
        sampler: Sampler,
        open_session: Callable[[NDArray[np.int32]], TeacherSession],
        prompts: PromptOrder,
        rules: RolloutRules,
        options: Callable[[], SamplingOptions],
        rollouts_per_prompt: int,
        queue_depth: int,
        seed: int,
        first_step: int,
        end_step: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._loop = loop
        self._sampler = sampler
        self._open_session = open_session
        self._prompts = prompts
        self._rules = rules
        self._options = options
        self._rollouts_per_prompt = rollouts_per_prompt
        self._queue_depth = queue_depth
        self._seed = seed
        self._next_step, self._end_step = first_step, end_step
        self._progress = progress
        self._under_way: deque[Future[RolloutBatch]] = deque()
        self._tasks: set[asyncio.Task[RolloutBatch]] = set()
        self.policy_version = first_step
        """Optimiser rounds of the weights in the sampler; the learner sets it after a sync."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RolloutBatch:
        self._launch_up_to(1)
        if not self._under_way:
            raise StopIteration
        future = self._under_way.popleft()
        try:
            batch = future.result()
        except BaseException:
            future.cancel()
            raise
        self._launch_up_to(self._queue_depth)
        return batch

    def wait_until_idle(self) -> None:
        """Returns once nothing is being generated: weights may be replaced."""
        for future in self._under_way:
            future.result()

    def close(self) -> None:
        """Ends what is under way; waits a little for a teacher that no longer answers."""
        with suppress(TimeoutError):
            self._loop.start(self._cancel_batches()).result(CLOSE_TIMEOUT_S)
        self._under_way.clear()

    async def _cancel_batches(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _launch_up_to(self, num_batches: int) -> None:
        while len(self._under_way) < num_batches and self._next_step < self._end_step:
            step, self._next_step = self._next_step, self._next_step + 1
            self._under_way.append(self._loop.start(self._tracked(step, self.policy_version)))

    async def _tracked(self, step: int, policy_version: int) -> RolloutBatch:
        with tracing.span("step", step=step):
            return await self._in_step(step, policy_version)

    async def _in_step(self, step: int, policy_version: int) -> RolloutBatch:
        task = asyncio.create_task(self._batch(step, policy_version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await task

    async def _batch(self, step: int, policy_version: int) -> RolloutBatch:
        prompts = [p for p in self._prompts.step(step) for _ in range(self._rollouts_per_prompt)]
        base = self._options()
        done = 0

        async def one(index: int, prompt: Prompt) -> Rollout | None:
            nonlocal done
            options = replace(base, seed=_seed(self._seed, step, index))
            rollout = await run_rollout(
                prompt,
                request_id=f"step{step}-{index}",
                options=options,
                sampler=self._sampler,
                session=self._open_session(prompt.token_ids),
                rules=self._rules,
                policy_version=policy_version,
            )
            done += 1
            self._progress(done, len(prompts))
            return rollout

        outcomes = await _all_or_first_error([one(i, p) for i, p in enumerate(prompts)])
        rollouts = [rollout for rollout in outcomes if rollout is not None]
        return RolloutBatch(
            step=step, rollouts=rollouts, num_unscored=len(outcomes) - len(rollouts)
        )


async def _all_or_first_error(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first failure cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _seed(run_seed: int, step: int, index: int) -> int:
    """A seed of 31 bits for one rollout, the same in every run with this run seed."""
    return int(np.random.SeedSequence((run_seed, step, index)).generate_state(1)[0] >> 1)
