"""Ids that take no part, and what ids mean, over a real loopback socket.

Run: python -m pytest tests/teacher/rpc/test_left_out.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.testing import local_teacher
from teacher_wire.errors import InvalidRequestError
from teacher_wire.id_ranges import IdRanges
from teacher_wire.records import ScoreOptions, TokenSpan
from teacher_wire.vocabulary import MAX_TOKENS_ASKED, Vocabulary
from tests.client.client_sessions import POLICY, PROMPT, client_of
from tests.teacher.scoring.fake_rows import assert_rows_equal

CUT = 320
TAIL: IdRanges = ((CUT, 512),)
OPTIONS = ScoreOptions(k=16, want_entropy=True, want_rank=True, excluded_ids=TAIL)


def span_below(limit: int, num_tokens: int = 30) -> TokenSpan:
    """Tokens and candidates below the limit."""
    rng = np.random.default_rng(0)
    return TokenSpan(
        offset=0,
        token_ids=rng.integers(0, limit, num_tokens, dtype=np.int32),
        candidate_ids=np.array([rng.permutation(limit)[:16] for _ in range(num_tokens)], np.int32),
    )


async def test_a_session_scores_as_a_teacher_of_the_narrower_vocabulary() -> None:
    span = span_below(CUT)
    async with local_teacher(FakeEngine(vocab_size=CUT)) as teacher:
        narrow = replace(OPTIONS, excluded_ids=())
        expected = await teacher.sessions.score_once(PROMPT, span, narrow, POLICY, tenant="t")
    async with local_teacher() as teacher, client_of(teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        in_session = await session.append(span)
        at_once = await client.score(PROMPT, span, OPTIONS, POLICY)
    for scores in (in_session, at_once):
        assert_rows_equal(scores.rows, expected.rows)
        assert (scores.drift, scores.verdict) == (expected.drift, expected.verdict)


def with_id(ids: NDArray[np.int32], token_id: int) -> NDArray[np.int32]:
    """The last one replaced."""
    changed = ids.copy()
    changed.flat[-1] = token_id
    return changed


SPAN = span_below(CUT)
assert SPAN.candidate_ids is not None
REFUSED = {
    "token": (
        replace(SPAN, token_ids=with_id(SPAN.token_ids, 400)),
        OPTIONS,
        r"token_ids\[29\] is 400, one of excluded_ids",
    ),
    "candidate": (
        replace(SPAN, candidate_ids=with_id(SPAN.candidate_ids, 511)),
        OPTIONS,
        r"candidate_ids\[29, 15\] is 511, one of excluded_ids",
    ),
    "beyond": (
        SPAN,
        replace(OPTIONS, excluded_ids=((400, 513),)),
        "excluded_ids goes up to 513, the vocabulary has 512 ids",
    ),
    "k": (SPAN, replace(OPTIONS, excluded_ids=((10, 512),)), "k is 16, the limit is 10"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_scored_without_those_ids_is_refused(case: str) -> None:
    span, options, text = REFUSED[case]
    engine = FakeEngine()
    async with local_teacher(engine) as teacher, client_of(teacher.address) as client:
        with pytest.raises(InvalidRequestError, match=text):
            await client.open(PROMPT, options, POLICY).append(span)
        with pytest.raises(InvalidRequestError, match=text):
            await client.score(PROMPT, span, options, POLICY)
    assert engine.num_queries == 0


async def test_a_prompt_may_hold_them() -> None:
    async with local_teacher() as teacher, client_of(teacher.address) as client:
        scores = await client.score(with_id(PROMPT, 400), SPAN, OPTIONS, POLICY)
        assert len(scores.rows) == 30


async def test_a_teacher_tells_its_tokens_by_range() -> None:
    vocabulary = Vocabulary(tokens=("a", None, " é", "[PAD2]"))
    async with (
        local_teacher(vocabulary=vocabulary) as teacher,
        client_of(teacher.address) as client,
    ):
        assert await client.tokens(0, 100) == {0: "a", 2: " é", 3: "[PAD2]"}
        assert await client.tokens(1, 2) == {2: " é"}
        assert await client.tokens(4, 10) == await client.tokens(2**32 - 1, 1) == {}
        for count in (0, MAX_TOKENS_ASKED + 1):
            with pytest.raises(InvalidRequestError, match=rf"count is {count}, must be in 1\.\."):
                await client.tokens(0, count)
    async with local_teacher() as teacher, client_of(teacher.address) as client:
        assert await client.tokens(0, 100) == {}
