"""Every column asked for arrives, whichever way; the cases are the table of columns.

A column that is dropped between the engine and whoever asked, in any place, fails here.
Run: pytest tests/teacher/test_columns.py
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from teacher_client.client import TeacherClient
from teacher_server.engine.base import EXTRAS, ScoreQuery
from teacher_server.engine.extras import DEFINITIONS
from teacher_server.engine.fake_engine import FakeEngine, score_rows
from teacher_server.http.app import create_app
from teacher_server.http.deps import HttpDeps
from teacher_server.scoring.judging import judged_rows
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire import codec
from teacher_wire.columns import CANDIDATE_IDS, POLICY, Column
from teacher_wire.drift_metrics import TeacherTopPAccept
from teacher_wire.records import (
    MODEL_COLUMNS,
    ROW_COLUMNS,
    ROW_FLAGS,
    DriftPolicy,
    ScoreOptions,
    ScoreRows,
    TokenSpan,
    concat_rows,
)
from teacher_wire.report_columns import in_report
from tests.teacher.scoring.fake_rows import cut

VOCAB, K, NUM_TOKENS = 64, 6, 23
PROMPT = np.array([3, 1, 4], np.int32)
ASKERS = (CANDIDATE_IDS, POLICY, *ROW_FLAGS)
CASES = {"nothing": set(), **{name: {name} for name in ASKERS}, "everything": set(ASKERS)}
RULE = DriftPolicy(metric=TeacherTopPAccept(k=4, top_p=0.6), w_drop=0.01, stop_in_flight=False)
"""It needs no candidates, so that each thing can be asked for alone."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One response, and what is asked of it."""

    span: TokenSpan
    options: ScoreOptions
    policy: DriftPolicy | None

    def expected(self) -> ScoreRows:
        query = ScoreQuery(
            token_ids=np.concatenate([PROMPT, self.span.token_ids]),
            first_row=len(PROMPT),
            candidate_ids=self.span.candidate_ids,
            k=K,
            temperature=1.0,
            extras=EXTRAS,
        )
        return judged_rows(score_rows(query, VOCAB), self.span, self.policy)


def question(asked: set[str]) -> Question:
    rng = np.random.default_rng(0)
    candidates = np.array([rng.permutation(VOCAB)[:5] for _ in range(NUM_TOKENS)], np.int32)
    return Question(
        span=TokenSpan(
            offset=0,
            token_ids=rng.integers(0, VOCAB, NUM_TOKENS, dtype=np.int32),
            candidate_ids=candidates if CANDIDATE_IDS in asked else None,
        ),
        options=ScoreOptions(k=K, **{flag: flag in asked for flag in ROW_FLAGS}),
        policy=RULE if POLICY in asked else None,
    )


@dataclass(frozen=True, kw_only=True)
class Ways:
    """One teacher, asked in each way that there is."""

    client: TeacherClient
    http: httpx.AsyncClient

    async def session(self, asked: Question) -> dict[str, Any]:
        """In appends of five tokens."""
        session = self.client.open(PROMPT, asked.options, asked.policy)
        parts = []
        for start in range(0, NUM_TOKENS, 5):
            piece = cut(asked.span, start, min(start + 5, NUM_TOKENS))
            parts.append((await session.append(piece)).rows)
        await session.close()
        return ROW_COLUMNS.by_name(concat_rows(parts))

    async def score(self, asked: Question) -> dict[str, Any]:
        scores = await self.client.score(PROMPT, asked.span, asked.options, asked.policy)
        return ROW_COLUMNS.by_name(scores.rows)

    async def _posted(self, asked: Question, **how: Any) -> dict[str, Any]:
        span, policy = asked.span, asked.policy
        body = {
            "prompt_ids": PROMPT.tolist(),
            "response_ids": span.token_ids.tolist(),
            "k": K,
            **{flag: getattr(asked.options, flag) for flag in ROW_FLAGS},
            **how,
        }
        if span.candidate_ids is not None:
            body["candidate_ids"] = span.candidate_ids.tolist()
        if policy is not None:
            body["policy"] = {
                "metric": policy.metric.name,
                "k": policy.metric.k,
                "top_p": RULE.metric.top_p,  # type: ignore[attr-defined]
                "w_drop": policy.w_drop,
                "stop_in_flight": policy.stop_in_flight,
            }
        reply = await self.http.post("/v1/score", json=body)
        assert reply.status_code == 200, reply.text
        rows: dict[str, Any] = reply.json()["rows"]
        return {name: rows[name] for name in ROW_COLUMNS.names}

    async def json(self, asked: Question) -> dict[str, Any]:
        rows = await self._posted(asked)
        return {column.name: _array(rows[column.name], column) for column in ROW_COLUMNS}

    async def base64(self, asked: Question) -> dict[str, Any]:
        rows = await self._posted(asked, encoding="base64")
        return {name: _unpacked(value) for name, value in rows.items()}


def _array(values: Any, column: Column) -> NDArray[Any] | None:
    return None if values is None else np.array(values, column.in_memory)


def _unpacked(value: dict[str, Any] | None) -> NDArray[Any] | None:
    if value is None:
        return None
    raw = base64.b64decode(value["data"])
    return np.frombuffer(raw, value["dtype"]).reshape(value["shape"])


@pytest_asyncio.fixture
async def ways(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ways]:
    """Messages that hold a few rows each, and appends that hold a part of a response: rows are cut
    and joined on every way."""
    monkeypatch.setattr(codec, "MAX_REPLY_BYTES", codec.ENVELOPE_BYTES + 300)
    engine = FakeEngine(vocab_size=VOCAB)
    info = teacher_info(engine, max_append_tokens=9)
    async with local_teacher(engine, info=info) as teacher:
        client = await TeacherClient.connect(
            [teacher.address],
            tokenizer_fingerprint="",
            vocab_size=VOCAB,
            run_id="columns",
            connect_timeout_s=30.0,
        )
        deps = HttpDeps(
            info=info,
            sessions=teacher.sessions,
            texts=teacher.texts,
            ready=lambda: True,
            metrics=teacher.metrics,
            tokenizer=None,
        )
        transport = httpx.ASGITransport(app=create_app(deps))
        async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as http:
            yield Ways(client=client, http=http)
        await client.aclose()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["session", "score", "json", "base64"])
async def test_what_was_asked_for_arrives_and_nothing_else(ways: Ways, way: str, case: str) -> None:
    asked = question(CASES[case])
    expected = ROW_COLUMNS.by_name(asked.expected())
    arrived = await getattr(ways, way)(asked)
    wanted = {column.name for column in ROW_COLUMNS if column.asked_by in {"", *CASES[case]}}
    assert {name for name, array in arrived.items() if array is not None} == wanted
    for column in ROW_COLUMNS:
        if column.name in wanted:
            assert arrived[column.name].dtype == column.in_memory, column.name
            np.testing.assert_array_equal(
                arrived[column.name], expected[column.name], err_msg=column.name
            )


async def test_a_report_shows_every_column_that_a_flag_asks_for(ways: Ways) -> None:
    asked = question(set(ROW_FLAGS))
    body = {"prompt_ids": PROMPT.tolist(), "response_ids": asked.span.token_ids.tolist(), "k": K}
    report = (await ways.http.post("/v1/analyze", json=body)).json()
    expected = asked.expected()
    for column in MODEL_COLUMNS.extras:
        shown = _array(report[in_report(column)], column)
        np.testing.assert_array_equal(shown, getattr(expected, column.name), column.name)


def test_every_column_that_a_flag_asks_for_has_a_definition() -> None:
    assert set(DEFINITIONS) == EXTRAS
