"""A teacher that is not the one the run began with is refused before a session is opened, and the
error says what was expected and what was found. Run: pytest tests/faults/test_version_skew.py
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from teacher_client import stream as teacher_stream
from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_server.engine.fake_engine import FakeEngine, fake_fingerprint
from teacher_server.testing import LocalTeacher, local_teacher, teacher_info
from teacher_wire.errors import FingerprintMismatchError
from teacher_wire.records import PROTOCOL_VERSION, TeacherInfo
from tests.faults.random_responses import OPTIONS, POLICY, PROMPT, VOCAB_SIZE, random_span
from tests.teacher.scoring.fake_rows import cut
from tests.waiting import LIMIT_S

INFO = replace(teacher_info(FakeEngine(vocab_size=VOCAB_SIZE)), weights_digest="before")
MINE = fake_fingerprint(VOCAB_SIZE)
SPAN = random_span(np.random.default_rng(0), 40)


class Place:
    """One port at which teachers come and go."""

    def __init__(self) -> None:
        self.port = 0
        self.stack = AsyncExitStack()

    async def put(self, info: TeacherInfo) -> LocalTeacher:
        """Another teacher instead of the one that was there."""
        await self.stack.aclose()
        engine = FakeEngine(vocab_size=info.vocab_size)
        teacher = await self.stack.enter_async_context(
            local_teacher(engine, port=self.port, info=info)
        )
        self.port = int(teacher.address.rsplit(":", 1)[1])
        return teacher


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    made = Place()
    yield made
    await made.stack.aclose()


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[TeacherClient]:
    client = await TeacherClient.connect(
        [address],
        tokenizer_fingerprint=MINE,
        vocab_size=VOCAB_SIZE,
        run_id="skew",
        connect_timeout_s=LIMIT_S,
        on_absent="wait",
        limits=RetryLimits(first_backoff_s=0.01, max_backoff_s=0.1),
    )
    try:
        yield client
    finally:
        await client.aclose()


async def test_an_old_client_is_refused_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = await place.put(INFO)
    monkeypatch.setattr(teacher_stream, "PROTOCOL_VERSION", PROTOCOL_VERSION - 1)
    reason = f"protocol_version is {PROTOCOL_VERSION - 1}, the server speaks {PROTOCOL_VERSION}"
    with pytest.raises(FingerprintMismatchError, match=reason):
        async with client_of(teacher.address):
            pass


async def test_a_client_with_another_tokenizer_is_refused_at_once(place: Place) -> None:
    teacher = await place.put(replace(INFO, tokenizer_fingerprint="theirs"))
    reason = f"tokenizer_fingerprint is {MINE}, the teacher's is theirs"
    with pytest.raises(FingerprintMismatchError, match=reason):
        async with client_of(teacher.address):
            pass


def upgraded(monkeypatch: pytest.MonkeyPatch) -> TeacherInfo:
    # Client and server share the process here: the client that is connected keeps its old number
    # by saying it is one older than what the new server speaks.
    monkeypatch.setattr(teacher_stream, "PROTOCOL_VERSION", PROTOCOL_VERSION - 1)
    return INFO


SKEWS: dict[str, tuple[Callable[[pytest.MonkeyPatch], TeacherInfo], str]] = {
    "weights": (
        lambda _: replace(INFO, weights_digest="after"),
        "weights_digest 'after', the run began with 'before'",
    ),
    "dtype": (
        lambda _: replace(INFO, dtype="bfloat16"),
        "dtype 'bfloat16', the run began with 'float32'",
    ),
    "tokenizer": (
        lambda _: replace(INFO, tokenizer_fingerprint="theirs"),
        f"tokenizer_fingerprint is {MINE}, the teacher's is theirs",
    ),
    "vocabulary": (
        lambda _: replace(INFO, vocab_size=VOCAB_SIZE + 1),
        f"vocab_size is {VOCAB_SIZE}, the teacher's is {VOCAB_SIZE + 1}",
    ),
    "protocol": (upgraded, f"protocol_version is {PROTOCOL_VERSION - 1}, the server speaks"),
}


@pytest.mark.parametrize("skew", SKEWS)
async def test_a_teacher_that_changed_between_connect_and_resume_is_refused(
    skew: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_info, reason = SKEWS[skew]
    first = await place.put(INFO)
    async with client_of(first.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        before = await session.append(cut(SPAN, 0, 20))
        with monkeypatch.context() as patch:
            other = await place.put(make_info(patch))
            # Although the client waits for an absent teacher as long as it takes.
            with pytest.raises(FingerprintMismatchError, match=reason):
                await asyncio.wait_for(session.append(cut(SPAN, 20, 40)), LIMIT_S)
            assert len(other.sessions) == 0
            assert other.scheduler.num_running == 0
        # The session is as it was: the right teacher goes on with it.
        again = await place.put(INFO)
        give_up = time.monotonic() + LIMIT_S
        after = None
        while after is None:
            assert time.monotonic() < give_up
            try:
                after = await session.append(cut(SPAN, 20, 40))
            except FingerprintMismatchError:
                await asyncio.sleep(0.05)
        assert len(again.sessions) == 1
        whole = await again.sessions.score_once(PROMPT, SPAN, OPTIONS, POLICY, tenant="t")
        ids = np.concatenate([before.rows.topk_ids, after.rows.topk_ids])
        np.testing.assert_array_equal(ids, whole.rows.topk_ids)
        assert after.drift == whole.drift
