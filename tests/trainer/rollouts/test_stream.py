"""The stream of rollouts. Run: python -m pytest tests/trainer/rollouts/test_stream.py"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from student_trainer.data import PromptOrder
from student_trainer.records import Prompt, SamplingOptions
from student_trainer.rollouts import stream as stream_module
from student_trainer.rollouts.budget import FixedBudget
from student_trainer.rollouts.stream import LoopThread, RolloutStream, Taken
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
    queue_depth: int = 0,
    num_steps: int = 10,
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
        queue_depth=queue_depth,
        seed=5,
        num_steps=num_steps,
    )


def contents(taken: Taken) -> list[tuple[str, list[int], list[float]]]:
    """What was taken, without the times."""
    return [
        (r.prompt.prompt_id, r.response_ids.tolist(), r.teacher.token_logprobs.tolist())
        for r in taken.rollouts
    ]


@pytest.mark.parametrize("count", [1, 4, 6])
def test_neither_depth_nor_portion_changes_the_given_the_same_weights(
    loop: LoopThread, count: int
) -> None:
    ahead = stream(loop, InMemorySampler(), queue_depth=1)
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


@pytest.mark.parametrize(("depth", "versions"), [(0, [0, 1, 2, 3]), (1, [0, 0, 1, 2])])
def test_rollout_records_the_version_of_the_weights_that_sampled_it(
    loop: LoopThread, depth: int, versions: list[int]
) -> None:
    sampler = InMemorySampler()
    given = stream(loop, sampler, queue_depth=depth)
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
        given.wait_until_idle()
        sampler.weights = given.policy_version = step + 1
    assert seen == [{version} for version in versions]


@pytest.mark.parametrize("depth", [0, 1])
def test_nothing_is_generated_for_steps_that_do_not_come(loop: LoopThread, depth: int) -> None:
    sampler = InMemorySampler()
    given = stream(loop, sampler, queue_depth=depth, num_steps=2)
    assert [len(given.take(4).rollouts) for _ in range(3)] == [4, 4, 0]
    given.wait_until_idle()
    assert {name.split("-")[0] for name in sampler.seeds} == {"step0", "step1"}


@pytest.mark.parametrize("depth", [0, 1])
def test_failed_rollout_cancels_the_others_and_is_raised(loop: LoopThread, depth: int) -> None:
    sampler = InMemorySampler()
    sessions: list[ScriptedSession] = []

    def open_session(_: Prompt) -> ScriptedSession:
        failures = {0: EngineError("boom")} if len(sessions) == 2 else {}
        pause = 0 if failures else 1_000_000
        sessions.append(ScriptedSession(failures=failures, turns_per_append=pause))
        return sessions[-1]

    with pytest.raises(EngineError, match="boom"):
        stream(loop, sampler, queue_depth=depth, open_session=open_session).take(4)
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

    given = stream(loop, sampler, queue_depth=1, open_session=open_session)
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

    given = stream(loop, InMemorySampler(), queue_depth=1, open_session=open_session)
    given.take(4)
    wait_until(lambda: sum(s.num_under_way for s in sessions) >= 4)
    given.close()  # without a bound it never ends


@pytest.mark.parametrize(("depth", "expected"), [(0, [1]), (1, [1, 2])])
def test_what_a_step_needs_is_generated_while_the_one_before_is_learnt_from(
    loop: LoopThread, depth: int, expected: list[int]
) -> None:
    """The learner is this thread: while it waits for the sampler, the sampler is not waiting."""
    sampler = InMemorySampler()
    given = stream(loop, sampler, queue_depth=depth)
    given.take(4)
    # A learner that goes on only when the next step's rollouts have ended can do so at depth 1.
    given.wait_until_idle()
    assert sorted({1 + int(name[4 : name.index("-")]) for name in sampler.ended}) == expected
    assert sampler.running == {}


def test_stream_goes_on_after_what_was_learnt_from(loop: LoopThread) -> None:
    straight, cut = (stream(loop, InMemorySampler(), queue_depth=1) for _ in range(2))
    expected = [contents(straight.take(4)) for _ in range(3)]
    cut.take(4)
    cut.settle()
    # Taken and not learnt from: a step that was given up.
    cut.take(4)
    assert cut.state() == {"steps": 1}
    resumed = stream(loop, InMemorySampler(), queue_depth=1)
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
