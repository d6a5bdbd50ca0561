"""What must never reach an engine, and what its failures may cost.

Run: pytest tests/faults/test_engine_guard.py
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from teacher_server.admission.scheduler import SchedulerLimits
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.testing import teacher_info
from teacher_wire import codec
from teacher_wire.errors import (
    CapacityError,
    DeadlineError,
    EngineError,
    InvalidRequestError,
    NonFiniteError,
    TeacherError,
)
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import ScoreOptions, TokenSpan
from teacher_wire.status import decode_error
from tests.teacher.rpc.raw_streams import Raw, raw_stream
from tests.teacher.scoring.fake_rows import cut, make_span
from tests.waiting import LIMIT_S, eventually


def ids(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


GOOD_SPAN = pb.TokenSpan(token_ids=ids(1, 2, 3))
BAD: dict[str, tuple[dict[str, Any], pb.TokenSpan, str]] = {
    "token beyond the vocabulary": ({}, pb.TokenSpan(token_ids=ids(1, 512)), r"token_ids\[1\]"),
    "negative token": ({}, pb.TokenSpan(token_ids=ids(-1)), r"token_ids\[0\]"),
    "smallest int32": ({}, pb.TokenSpan(token_ids=ids(-(2**31))), r"token_ids\[0\]"),
    "no token": ({}, pb.TokenSpan(), "token_ids has 0"),
    "too many tokens": ({}, pb.TokenSpan(token_ids=ids(*range(65))), "token_ids has 65"),
    "half a token": ({}, pb.TokenSpan(token_ids=b"123"), "token_ids has 3 bytes"),
    "candidate beyond the vocabulary": (
        {},
        pb.TokenSpan(token_ids=ids(1), num_candidates=2, candidate_ids=ids(3, 512)),
        r"candidate_ids\[0, 1\]",
    ),
    "candidates of another shape": (
        {},
        pb.TokenSpan(token_ids=ids(1), num_candidates=2**31, candidate_ids=ids(3)),
        "candidate_ids has 4 bytes",
    ),
    "prompt beyond the vocabulary": ({"prompt_ids": ids(512)}, GOOD_SPAN, r"prompt_ids\[0\]"),
    "no prompt": ({"prompt_ids": b""}, GOOD_SPAN, "prompt_ids has 0"),
    "prefix beyond the context": ({"prompt_ids": ids(*[1] * 200)}, GOOD_SPAN, "200 tokens"),
    "k beyond the limit": (
        {"options": codec.encode_options(ScoreOptions(k=129))},
        GOOD_SPAN,
        "k is 129",
    ),
    "no k": ({"options": pb.ScoreOptions(temperature=1.0, logprob_dtype=2)}, GOOD_SPAN, "k is 0"),
    "temperature of nought": (
        {"options": pb.ScoreOptions(k=4, logprob_dtype=2)},
        GOOD_SPAN,
        "temperature",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_can_never_be_scored_is_refused_before_the_engine(name: str) -> None:
    opening, span, words = BAD[name]
    engine = FakeEngine(max_context=128)
    async with raw_stream(engine, info=teacher_info(engine, max_append_tokens=64)) as (raw, _):
        await raw.open(**({"policy": None} | opening))
        await raw.send(append=pb.Append(session_id="s", span=span))
        error = await next_error(raw)
        assert type(error) is InvalidRequestError
        assert error.retry_after_ms == 0
        with pytest.raises(InvalidRequestError, match=words):
            raise error
        assert engine.num_queries == 0
        await raw.open("good", policy=None)
        await raw.send(append=pb.Append(session_id="good", span=GOOD_SPAN))
        while not (reply := await raw.receive()).HasField("scores"):
            assert reply.error.session_id != "good"
        assert engine.num_queries == 1


async def next_error(raw: Raw) -> TeacherError:
    while not (reply := await raw.receive()).HasField("error"):
        pass
    return decode_error(reply.error)


async def outcomes(raw: Raw, num: int) -> dict[str, type[TeacherError] | None]:
    """By session: the class of its error, or None for scores."""
    found: dict[str, type[TeacherError] | None] = {}
    while len(found) < num:
        reply = await raw.receive()
        if reply.HasField("scores"):
            found[reply.scores.session_id] = None
        elif reply.HasField("error"):
            found[reply.error.session_id] = type(decode_error(reply.error))
    return found


async def test_running_out_of_memory_costs_one_step_and_the_next_is_answered() -> None:
    engine = FakeEngine(base_latency_s=0.1, step_tokens=4 * 16)
    async with raw_stream(engine) as (raw, teacher):
        names = [str(index) for index in range(9)]
        for name in names:
            await raw.open(name, policy=None)
        await raw.append(make_span(64), names[0])  # keeps the engine busy while a step collects
        await eventually(lambda: engine.num_queries == 1)
        engine.inject(Fault.OOM)
        for name in names[1:]:
            await raw.append(make_span(16), name)
        found = await outcomes(raw, len(names))
        assert [found[name] for name in names[1:5]] == [CapacityError] * 4
        assert [found[name] for name in (names[0], *names[5:])] == [None] * 5
        for name in names[1:5]:  # the same request again, as its hint says
            await raw.append(make_span(16), name)
        assert set((await outcomes(raw, 4)).values()) == {None}
        assert teacher.scheduler.num_running == 0


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.RAISE, EngineError),
        (Fault.CRASH, EngineError),
        (Fault.NAN, NonFiniteError),
        (Fault.LEAK_NAN, NonFiniteError),
        (Fault.OOM, CapacityError),
    ],
)
async def test_a_fault_costs_one_append_and_changes_no_session(
    fault: Fault, error: type[TeacherError]
) -> None:
    engine = FakeEngine()
    async with raw_stream(engine) as (raw, _):
        await raw.open(policy=None)
        await raw.append(cut(make_span(20), 0, 10))
        assert set((await outcomes(raw, 1)).values()) == {None}
        engine.inject(fault)
        await raw.append(cut(make_span(20), 10, 20))
        told = await next_error(raw)
        assert type(told) is error
        assert bool(told.retry_after_ms) == (fault is Fault.OOM)
        await raw.append(cut(make_span(20), 10, 20))
        assert set((await outcomes(raw, 1)).values()) == {None}


async def test_the_table_of_sessions_never_passes_its_limit_and_the_idlest_makes_room() -> None:
    engine = FakeEngine()
    async with raw_stream(engine, info=teacher_info(engine, max_sessions=3)) as (raw, teacher):
        for name in "abcde":
            await raw.open(name, policy=None)
            await raw.append(make_span(5), name)
            await outcomes(raw, 1)
            assert len(teacher.sessions) <= 3
        assert list(engine.forgotten) == ["4:test/a", "4:test/b"]
        await raw.append(cut(make_span(9), 5, 9), "a")
        assert (await next_error(raw)).__class__.__name__ == "SessionNotFoundError"
        await raw.open("a", policy=None, scored_ids=codec.encode_ids(make_span(5).token_ids))
        await raw.append(cut(make_span(9), 5, 9), "a")
        assert await outcomes(raw, 1) == {"a": None}


async def test_expired_appends_never_reach_the_engine_and_are_counted() -> None:
    engine = FakeEngine()
    async with raw_stream(engine, scheduler_limits=SchedulerLimits(max_running=1)) as (
        raw,
        teacher,
    ):
        names = [str(index) for index in range(8)]
        for name in ("stuck", *names):
            await raw.open(name, policy=None)
        engine.inject(Fault.HANG)
        await raw.append(make_span(5), "stuck")
        await eventually(lambda: engine.num_queries == 1)
        for name in names:
            await raw.append(make_span(5), name, deadline_ms=30)
            # Waits behind the other: its time has run out before it is its turn.
            await raw.append(make_span(7), name, deadline_ms=31)
        errors = []
        while len(errors) < 2 * len(names):
            reply = await raw.receive()
            if reply.HasField("error"):
                errors.append(type(decode_error(reply.error)))
        assert set(errors) == {DeadlineError}
        assert (engine.num_queries, engine.num_rows) == (1, 5)
        dropped = 'teacher_dropped_total{reason="deadline"} 16.0'
        assert dropped in teacher.metrics.render().decode()


async def test_a_deadline_counts_from_the_arrival_of_an_append() -> None:
    engine = FakeEngine(base_latency_s=1.0)
    async with raw_stream(engine) as (raw, _):
        await raw.open(policy=None)
        span = TokenSpan(offset=0, token_ids=np.arange(4, dtype=np.int32))
        await raw.append(span)
        await raw.append(span, deadline_ms=150)  # the same session: waits a second for the first
        assert type(await asyncio.wait_for(next_error(raw), LIMIT_S)) is DeadlineError
        assert engine.num_queries == 1
