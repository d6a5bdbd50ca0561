"""Scored rollouts, one after another, and as far ahead of the learner as they may grow old. Only in
here is the teacher asked.

Generation and scoring run on one asyncio loop in a thread of its own; the learner's thread takes
finished rollouts in the order of their prompts. With a staleness of 0 nothing is generated before
it is asked for. Else a step's worth is always under way: as one ends the next one begins, while the
learner works and while the others end. Knows no model.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count as counted
from itertools import islice
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import uvloop

from student_trainer.data import PromptOrder
from student_trainer.process.ranks import ALONE, Ranks
from student_trainer.process.stopping import Stopped, StopRequest
from student_trainer.records import Prompt, Rollout, SamplingOptions
from student_trainer.rollouts.budget import LengthBudget
from student_trainer.rollouts.rollout import RolloutRules, TeacherSession, run_rollout
from student_trainer.rollouts.samplers.base import Sampler
from teacher_wire import tracing

T = TypeVar("T")
OpenSession: TypeAlias = Callable[[Prompt], TeacherSession]
"""A session at the teacher of a prompt, given what that teacher is to see of it."""
CLOSE_TIMEOUT_S = 5.0
MAX_ROUNDS_PER_STEP = 8
"""Times its rollouts that a step takes to have its tokens: a student that says nothing at all must
not be waited for."""
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
        return self.wait(self.start(work))

    def wait(self, future: Future[T]) -> T:
        """Waits for what was begun; an interrupt here cancels it."""
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

    @property
    def num_tokens(self) -> int:
        """Response tokens of all."""
        return sum(len(rollout) for rollout in self.rollouts)

    def and_more(self, others: Taken) -> Taken:
        """These, and others taken after them."""
        return Taken(
            rollouts=self.rollouts + others.rollouts,
            num_unscored=self.num_unscored + others.num_unscored,
        )


class RolloutStream:
    """The rollouts of a run, from the first step on: `rollouts_per_prompt` of each prompt.

    How far it goes ahead: a rollout that begins with the weights of version V, when n rollouts were
    taken before those weights were there, is at most the n + R (S + 1)th (R a step's rollouts, S
    the staleness allowed). Each step takes R at least, so its weights are at most S versions old
    when it is learnt from. Of those at most R are generated at once, and none begins while R
    finished ones wait: they would only grow old.
    """

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
        max_staleness: int,
        seed: int,
        num_steps: int,
        tokens_per_step: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        ranks: Ranks = ALONE,
        stop: StopRequest | None = None,
    ) -> None:
        """`options` are those of a rollout, given the most tokens that it may have.

        `rules` are those of each teacher, by what a prompt calls it. `tokens_per_step`: response
        tokens that a step has at least; more rollouts are generated for it until it has them. Of
        several processes (`ranks`) each generates those of its prompts, and takes all, unless one
        is asked to `stop`.
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
        self._ranks = ranks
        self._stop = stop or StopRequest()
        self.rollouts_per_step = prompts.prompts_per_step // ranks.world * rollouts_per_prompt
        """Of this process."""
        self._max_staleness = max_staleness
        self._seed = seed
        self._num_steps = num_steps
        self._tokens_per_step = tokens_per_step
        self._progress = progress
        self._lock = threading.Lock()
        """Of what follows: the learner's thread and the loop's begin rollouts."""
        self._under_way: deque[Future[Rollout | None]] = deque()
        self._num_running = 0
        self._goes_ahead = True
        self._coming = self._from(0)
        self._num_taken = self._num_taken_before_weights = 0
        self._settled = {"steps": 0, "rollouts": 0}
        self._policy_version = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._finished: Counter[int] = Counter()

    @property
    def policy_version(self) -> int:
        """Optimiser rounds of the weights in the sampler."""
        return self._policy_version

    def use_version(self, version: int) -> None:
        """The sampler has these weights now: what begins from here on is theirs."""
        with self._lock:
            self._policy_version = version
            self._num_taken_before_weights = self._num_taken
        self._go_ahead()

    def take_step(self) -> Taken:
        """The rollouts of one step: `rollouts_per_step`, and whole prompts more of them until it
        has its tokens.

        Raises what a rollout raised, TeacherError say, after the others were cancelled.
        """
        taken = self.take(self.rollouts_per_step)
        while (more := self._num_missing(taken)) > 0:
            others = self.take(more)
            taken = taken.and_more(others)
            if not others.rollouts:
                break
        return taken

    def _num_missing(self, taken: Taken) -> int:
        """Rollouts that a step lacks, if they are as long as those it has."""
        if self._tokens_per_step is None or not taken.num_tokens:
            return 0
        mean_tokens = taken.num_tokens / len(taken.rollouts)
        wanted = math.ceil(self._tokens_per_step / mean_tokens / self._rollouts_per_prompt)
        world = self._ranks.world
        most = MAX_ROUNDS_PER_STEP * self.rollouts_per_step
        num_taken = (len(taken.rollouts) + taken.num_unscored) // world
        if taken.num_tokens >= self._tokens_per_step or num_taken >= most:
            return 0
        missing = wanted - len(taken.rollouts) // self._rollouts_per_prompt
        missing = max(1, -(-missing // world))
        return min(missing * self._rollouts_per_prompt, self.rollouts_per_step, most - num_taken)

    def take(self, count: int) -> Taken:
        """The next `count` rollouts of every process, in the order of their prompts; fewer at the
        end of the run. Raises as `take_step` does."""
        with self._lock:
            self._launch(count - len(self._under_way))
            futures = [*islice(self._under_way, count)]
        outcomes = self._of_all(partial(self._results, futures))
        with self._lock:
            for _ in futures:
                self._under_way.popleft()
            self._num_taken += len(futures)
        self._go_ahead()
        rollouts = [rollout for rollout in outcomes if rollout is not None]
        return Taken(rollouts=rollouts, num_unscored=len(outcomes) - len(rollouts))

    def _of_all(self, results: Callable[[], list[Rollout | None]]) -> list[Rollout | None]:
        """What every process got, prompt by prompt as one alone would have them.

        One that was asked to stop meanwhile says so before any of them waits for its rollouts.
        """
        if self._ranks.world == 1:
            return results()
        try:
            with self._stop.may_give_up():
                own: list[Rollout | None] | None = results()
        except Stopped:
            own = None
        of_all = self._ranks.gathered(own)
        found = [outcomes for outcomes in of_all if outcomes is not None]
        if len(found) < len(of_all):
            raise Stopped
        step = self._rollouts_per_prompt
        parts = range(0, max(map(len, found)), step)
        return [r for i in parts for outcomes in found for r in outcomes[i : i + step]]

    def settle(self) -> None:
        """A step is done, and learnt from what was taken so far: a resumed run begins after it."""
        self._settled = {"steps": self._settled["steps"] + 1, "rollouts": self._num_taken}

    def begin_again(self, version: int, *, learnt: bool) -> None:
        """After `close`: what was under way is generated again, by weights of this version; so is
        what was taken since the last step that is done, unless it was learnt from."""
        with self._lock:
            if not learnt:
                self._num_taken = self._settled["rollouts"]
            self._coming = self._from(self._num_taken)
            self._finished.clear()
            self._goes_ahead = True
        self.use_version(version)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Nothing is generated within; what was under way has ended."""
        with self._lock:
            self._goes_ahead = False
        self._results(self._under_way)
        yield
        self._goes_ahead = True
        self._go_ahead()

    def close(self) -> None:
        """Ends what is under way; waits a little for a teacher that no longer answers."""
        with self._lock:
            self._goes_ahead = False
        with suppress(TimeoutError):
            self._loop.start(_cancel(self._tasks)).result(CLOSE_TIMEOUT_S)
        self._under_way.clear()

    def state(self) -> dict[str, Any]:
        """How many steps are done, and how many rollouts they took; the others are generated
        again."""
        return dict(self._settled)

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on after so many steps, with weights of as many versions."""
        self._settled = dict(state)
        self._policy_version = state["steps"]
        self._num_taken = self._num_taken_before_weights = state["rollouts"]
        self._coming = self._from(self._num_taken)

    def _from(self, first: int) -> Iterator[tuple[int, int, Prompt]]:
        """Round, index within the round, and prompt of every rollout that is still to come: a round
        is a step's prompts, and a step has more than one of them where it lacks tokens."""
        rounds = counted() if self._tokens_per_step is not None else range(self._num_steps)
        for round_ in islice(rounds, first // self.rollouts_per_step, None):
            prompts = self._prompts.step(round_)[self._ranks.rank :: self._ranks.world]
            repeated = (prompt for prompt in prompts for _ in range(self._rollouts_per_prompt))
            for index, prompt in enumerate(repeated):
                if round_ * self.rollouts_per_step + index >= first:
                    yield round_, index, prompt

    def _go_ahead(self) -> None:
        """Begins what may begin before it is asked for."""
        with self._lock:
            if not self._goes_ahead or self._max_staleness == 0:
                return
            steps = min(self._max_staleness + 1, self._num_steps - self._policy_version)
            last = self._num_taken_before_weights + steps * self.rollouts_per_step
            may_begin = last - self._num_taken - len(self._under_way)
            num_waiting = len(self._under_way) - self._num_running
            if num_waiting < self.rollouts_per_step:
                self._launch(min(may_begin, self.rollouts_per_step - self._num_running))

    def _launch(self, count: int) -> None:
        options = self._options(self.budget.max_tokens)
        for round_, index, prompt in islice(self._coming, max(0, count)):
            seeded = replace(options, seed=_seed(self._seed, round_, self._index_of_all(index)))
            work = self._rollout(round_, index, prompt, seeded, self._policy_version)
            self._num_running += 1
            self._under_way.append(self._loop.start(work))

    def _index_of_all(self, index: int) -> int:
        """Of one of our rollouts in a round among those of every process."""
        prompt, copy = divmod(index, self._rollouts_per_prompt)
        prompt = prompt * self._ranks.world + self._ranks.rank
        return prompt * self._rollouts_per_prompt + copy

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
        self, round_: int, index: int, prompt: Prompt, options: SamplingOptions, version: int
    ) -> Rollout | None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with tracing.span("rollout", step=round_, index=index):
                rollout = await run_rollout(
                    prompt,
                    request_id=f"step{round_}-{index}",
                    options=options,
                    sampler=self._sampler,
                    session=self._open_session(prompt),
                    rules=self._rules[prompt.teacher],
                    policy_version=version,
                )
        finally:
            self._tasks.discard(task)
            with self._lock:
                self._num_running -= 1
        self._finished[round_] += 1
        self._progress(self._finished[round_], self.rollouts_per_step)
        self._go_ahead()
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
