"""The stream of rollouts. Run: python -m pytest tests/trainer/rollouts/test_stream.py"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from student_trainer.data import PromptOrder
from student_trainer.records import Delta, Prompt, SamplingOptions
from student_trainer.rollouts import stream as stream_module
from student_trainer.rollouts.budget import FixedBudget
from student_trainer.rollouts.stream import (
    MAX_ROUNDS_PER_STEP,
    LoopThread,
    RolloutStream,
    Taken,
)
from student_trainer.settings.budget import FixedBudgetSettings
from teacher_wire.errors import EngineError, NotReadyError
from tests.trainer.in_memory import InMemorySampler, ScriptedSession, prompt, rules
from tests.waiting import LIMIT_S, wait_until

PROMPTS = [prompt(i, i + 1) for i in range(2, 8)]


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    """A loop that is closed again."""
    thread = LoopThread()
    yield thread
    thread.close()


def stream(
    loop: LoopThread,
    sampler: InMemorySampler,
    *,
    max_staleness: int = 0,
    num_steps: int = 10,
    tokens_per_step: int | None = None,
    open_session: Callable[[Prompt], ScriptedSession] = lambda _: ScriptedSession(),
    finish_when_absent: bool = False,
) -> RolloutStream:
    """Two rollouts of each of two prompts a step."""
    return RolloutStream(
        loop=loop,
        sampler=sampler,
        open_session=open_session,
        prompts=PromptOrder(PROMPTS, prompts_per_step=2, seed=0),
        rules={None: rules(finish_when_absent=finish_when_absent)},
        budget=FixedBudget(FixedBudgetSettings(max_tokens=12)),
        options=lambda max_tokens: SamplingOptions(max_tokens=max_tokens, num_topk=2),
        rollouts_per_prompt=2,
        max_staleness=max_staleness,
        seed=5,
        num_steps=num_steps,
        tokens_per_step=tokens_per_step,
    )


def contents(taken: Taken) -> list[tuple[str, list[int], list[float]]]:
    """What was taken, without the times."""
    return [
        (r.prompt.prompt_id, r.response_ids.tolist(), r.teacher.token_logprobs.tolist())
        for r in taken.rollouts
    ]


@pytest.mark.parametrize("count", [1, 4, 6])
def test_neither_staleness_nor_portion_changes_the_given_the_same_weights(
    loop: LoopThread, count: int
) -> None:
    ahead = stream(loop, InMemorySampler(), max_staleness=1)
    at_once = stream(loop, InMemorySampler())
    left = [item for _ in range(12 // count) for item in contents(ahead.take(count))]
    right = [item for _ in range(3) for item in contents(at_once.take(4))]
    assert len(left) == 12
    assert left == right


def test_given_one_prompt_and_of_two_steps_differ(loop: LoopThread) -> None:
    sampler = InMemorySampler()
    given = stream(loop, sampler)
    responses = [tuple(r.response_ids) for _ in range(3) for r in given.take(4).rollouts]
    assert len(set(responses)) == len(responses) == 12
    assert len(set(sampler.seeds.values())) == 12


@pytest.mark.parametrize(("staleness", "versions"), [(0, [0, 1, 2, 3]), (1, [0, 0, 1, 2])])
def test_rollout_records_the_version_of_the_weights_that_sampled_it(
    loop: LoopThread, staleness: int, versions: list[int]
) -> None:
    sampler = InMemorySampler()
    given = stream(loop, sampler, max_staleness=staleness)
    seen = []
    for step in range(4):
        rollouts = given.take(4).rollouts
        seen.append({r.policy_version for r in rollouts})
        for rollout in rollouts:
            fresh = InMemorySampler(weights=rollout.policy_version)
            possible = [
                fresh.draw(rollout.prompt.token_ids, SamplingOptions(max_tokens=12, seed=seed))[0]
                for name, seed in list(sampler.seeds.items())
                if name.startswith(f"step{step}-")
            ]
            assert any(np.array_equal(rollout.response_ids, ids) for ids in possible)
        with given.idle():
            sampler.weights = step + 1
            given.use_version(step + 1)
    assert seen == [{version} for version in versions]


@pytest.mark.parametrize("staleness", [0, 1])
def test_nothing_is_generated_for_steps_that_do_not_come(loop: LoopThread, staleness: int) -> None:
    sampler = InMemorySampler()
    given = stream(loop, sampler, max_staleness=staleness, num_steps=2)
    assert [len(given.take(4).rollouts) for _ in range(3)] == [4, 4, 0]
    with given.idle():
        pass
    assert {name.split("-")[0] for name in sampler.seeds} == {"step0", "step1"}


@pytest.mark.parametrize("staleness", [0, 1])
def test_failed_rollout_cancels_the_others_and_is_raised(loop: LoopThread, staleness: int) -> None:
    sampler = InMemorySampler()
    sessions: list[ScriptedSession] = []

    def open_session(_: Prompt) -> ScriptedSession:
        failures = {0: EngineError("boom")} if len(sessions) == 2 else {}
        pause = 0 if failures else 1_000_000
        sessions.append(ScriptedSession(failures=failures, turns_per_append=pause))
        return sessions[-1]

    with pytest.raises(EngineError, match="boom"):
        stream(loop, sampler, max_staleness=staleness, open_session=open_session).take(4)
    assert sampler.running == {}
    assert [session.num_closed for session in sessions] == [1] * 4


def test_unscored_rollouts_are_left_out_and_counted(loop: LoopThread) -> None:
    sessions: list[ScriptedSession] = []

    def open_session(_: Prompt) -> ScriptedSession:
        failures = {0: NotReadyError("away")} if len(sessions) == 1 else {}
        sessions.append(ScriptedSession(failures=failures))
        return sessions[-1]

    given = stream(loop, InMemorySampler(), open_session=open_session, finish_when_absent=True)
    batch = given.take(4)
    assert (len(batch.rollouts), batch.num_unscored) == (3, 1)


def test_step_of_which_nothing_was_scored_is_seen_and_counted(loop: LoopThread) -> None:
    given = stream(
        loop,
        InMemorySampler(),
        open_session=lambda _: ScriptedSession(failures={0: NotReadyError("away")}),
        finish_when_absent=True,
    )
    batch = given.take(4)
    assert (batch.rollouts, batch.num_unscored) == ([], 4)
    assert given.take(4).num_unscored == 4


def test_closed_source_leaves_nothing_running(loop: LoopThread) -> None:
    sampler = InMemorySampler()
    sessions: list[ScriptedSession] = []

    def open_session(_: Prompt) -> ScriptedSession:
        sessions.append(ScriptedSession(turns_per_append=0 if len(sessions) < 4 else 1_000_000))
        return sessions[-1]

    given = stream(loop, sampler, max_staleness=1, open_session=open_session)
    given.take(4)
    wait_until(lambda: len(sessions) == 8)
    given.close()
    assert len(sessions) == 8
    assert sampler.running == {}
    assert all(session.num_closed == 1 for session in sessions)


class StuckSession(ScriptedSession):
    """Its teacher does not answer the end of a session."""

    async def close(self) -> None:
        await asyncio.Event().wait()


def test_teacher_that_does_not_answer_does_not_keep_a_source_from_closing(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "CLOSE_TIMEOUT_S", 0.2)
    sessions: list[ScriptedSession] = []

    def open_session(_: Prompt) -> ScriptedSession:
        pause, kind = (0, ScriptedSession) if len(sessions) < 4 else (1_000_000, StuckSession)
        sessions.append(kind(turns_per_append=pause))
        return sessions[-1]

    given = stream(loop, InMemorySampler(), max_staleness=1, open_session=open_session)
    given.take(4)
    wait_until(lambda: sum(s.num_under_way for s in sessions) >= 4)
    given.close()  # without a bound it never ends


@pytest.mark.parametrize(("staleness", "expected"), [(0, [1]), (1, [1, 2])])
def test_what_a_step_needs_is_generated_while_the_one_before_is_learnt_from(
    loop: LoopThread, staleness: int, expected: list[int]
) -> None:
    """The learner is this thread: while it waits for the sampler, the sampler is not waiting."""
    sampler = InMemorySampler()
    given = stream(loop, sampler, max_staleness=staleness)
    given.take(4)
    # A learner that goes on only when the next step's rollouts have ended can do so with 1.
    with given.idle():
        pass
    assert sorted({1 + int(name[4 : name.index("-")]) for name in sampler.ended}) == expected
    assert sampler.running == {}


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_no_rollout_is_older_than_allowed_and_none_more_than_a_step_waits(
    loop: LoopThread, staleness: int
) -> None:
    """However long each takes."""
    turns = iter(np.random.default_rng(staleness).integers(0, 60, 1000).tolist())
    sampler = WatchedSampler()
    given = stream(
        loop,
        sampler,
        max_staleness=staleness,
        num_steps=30,
        open_session=lambda _: ScriptedSession(turns_per_append=next(turns)),
    )
    oldest = []
    for step in range(30):
        rollouts = given.take_step().rollouts
        assert len(rollouts) == 4
        oldest.append(step - min(r.policy_version for r in rollouts))
        sampler.weights = step + 1
        given.use_version(step + 1)
    assert max(oldest) <= staleness
    assert (max(oldest) > 0) == (staleness > 0)
    assert sampler.most_running <= 4
    assert given.take_step().rollouts == []


class WatchedSampler(InMemorySampler):
    """Remembers how many it had at once."""

    most_running = 0

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        async for delta in super().generate(request_id, prompt_ids, options):
            self.most_running = max(self.most_running, len(self.running))
            yield delta


def test_others_begin_while_a_long_rollout_ends(loop: LoopThread) -> None:
    """The one of the next step that lasts keeps the step after it from nothing but being taken."""
    sampler = InMemorySampler()
    sessions: list[ScriptedSession] = []

    def open_session(_: Prompt) -> ScriptedSession:
        sessions.append(ScriptedSession(turns_per_append=10**9 if len(sessions) == 4 else 0))
        return sessions[-1]

    given = stream(loop, sampler, max_staleness=1, open_session=open_session)
    given.take_step()
    wait_until(lambda: sum(name.startswith("step1-") for name in sampler.ended) == 4)
    assert not any(name.startswith("step2-") for name in sampler.seeds)
    given.use_version(1)
    wait_until(lambda: sum(name.startswith("step2-") for name in sampler.ended) >= 3)
    assert given.policy_version == 1
    given.close()


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_step_takes_more_prompts_until_it_has_its_tokens(
    loop: LoopThread, staleness: int
) -> None:
    """Three tokens each: four rollouts have twelve of twenty, and whole prompts are added."""

    def made() -> RolloutStream:
        sampler = InMemorySampler(stop_after=3)
        return stream(loop, sampler, max_staleness=staleness, tokens_per_step=20, num_steps=4)

    straight, cut = made(), made()
    steps = []
    for version in range(1, 5):
        taken = straight.take_step()
        steps.append(contents(taken))
        assert (len(taken.rollouts), taken.num_tokens) == (8, 24)
        straight.settle()
        straight.use_version(version)
    rollouts = [rollout for step in steps for rollout in step]
    assert len({str(rollout) for rollout in rollouts}) == 32
    for version in range(1, 3):
        cut.take_step()
        cut.settle()
        cut.use_version(version)
    assert cut.state() == {"steps": 2, "rollouts": 16}
    resumed = made()
    resumed.load(cut.state())
    assert [contents(resumed.take_step()) for _ in range(2)] == steps[2:]


def test_a_step_does_not_wait_for_tokens_of_a_student_that_says_nothing(loop: LoopThread) -> None:
    given = stream(loop, InMemorySampler(stop_after=1), tokens_per_step=10**6)
    assert len(given.take_step().rollouts) == 4 * MAX_ROUNDS_PER_STEP


def test_stream_goes_on_after_what_was_learnt_from(loop: LoopThread) -> None:
    straight, cut = (stream(loop, InMemorySampler(), max_staleness=1) for _ in range(2))
    expected = [contents(straight.take(4)) for _ in range(3)]
    cut.take(4)
    cut.settle()
    # Taken and not learnt from: a step that was given up.
    cut.take(4)
    assert cut.state() == {"steps": 1, "rollouts": 4}
    resumed = stream(loop, InMemorySampler(), max_staleness=1)
    resumed.load(cut.state())
    assert resumed.policy_version == 1
    assert [contents(resumed.take(4)) for _ in range(2)] == expected[1:]


def test_loop_thread_returns_results_and_raises_errors(loop: LoopThread) -> None:
    async def answer(value: int) -> int:
        await asyncio.sleep(0)
        if value < 0:
            raise ValueError(f"value {value}")
        return value

    assert loop.run(answer(4)) == 4
    with pytest.raises(ValueError, match="value -1"):
        loop.run(answer(-1))


def test_loop_thread_runs_work_beside_its_caller(loop: LoopThread) -> None:
    async def where() -> int:
        return threading.get_ident()

    started, go_on = threading.Event(), threading.Event()

    async def wait() -> str:
        started.set()
        await asyncio.to_thread(go_on.wait, LIMIT_S)
        return "done"

    future = loop.start(wait())
    assert started.wait(LIMIT_S)
    assert loop.run(where()) != threading.get_ident()
    assert not future.done()
    go_on.set()
    assert future.result(LIMIT_S) == "done"


def test_closed_loop_thread_ends_what_it_still_runs() -> None:
    thread = LoopThread()
    ended, started = threading.Event(), threading.Event()

    async def forever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    future = thread.start(forever())
    assert started.wait(LIMIT_S)
    thread.close()
    assert ended.is_set()
    assert future.cancelled()
    assert "rollouts" not in [t.name for t in threading.enumerate()]
