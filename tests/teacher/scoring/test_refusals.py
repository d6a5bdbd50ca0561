"""What a session refuses before the engine is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.errors import (
    InvalidRequestError,
)
from teacher_wire.records import (
    DriftPolicy,
    DriftState,
    ScoreOptions,
    TokenSpan,
)
from tests.teacher.scoring.fake_rows import (
    VOCAB,
    cut,
    make_span,
)
from tests.teacher.scoring.session_tables import PROMPT, Table

Change = Callable[[TokenSpan], TokenSpan]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda s: replace(s, token_ids=np.where(s.token_ids >= 0, VOCAB, 0)),
            "token_ids.0. is 512",
        ),
        (lambda s: replace(s, token_ids=s.token_ids - VOCAB), "must be in 0..511"),
        (lambda s: replace(s, candidate_ids=s.candidate_ids + VOCAB), "candidate_ids.0, 0."),
        (lambda s: replace(s, candidate_ids=s.candidate_ids[:, :7]), "7 ids a row.*compares 8"),
        (lambda s: replace(s, candidate_ids=None), "0 ids a row.*compares 8"),
        (lambda s: replace(s, candidate_ids=s.candidate_ids[:, :0]), "0 ids a row"),
        (lambda s: replace(s, candidate_ids=np.tile(s.candidate_ids, (1, 9))), "144 ids.*1..128"),
        (lambda s: cut(s, 0, 0), "0 tokens"),
        (lambda s: make_span(101), "101 tokens, must have 1..100"),
    ],
)
async def test_hostile_spans_never_reach_the_engine(change: Change, text: str) -> None:
    table = Table(max_append_tokens=100)
    table.open()
    with pytest.raises(InvalidRequestError, match=text):
        await table.append(change(make_span(10)))
    assert table.engine.num_queries == 0


async def test_a_response_beyond_the_context_is_refused() -> None:
    table = Table()
    table.open()
    await table.append(make_span(590))
    late = make_span(6, offset=590)
    with pytest.raises(InvalidRequestError, match="601 tokens, the limit is 600"):
        await table.append(late)
    with pytest.raises(InvalidRequestError, match="605 tokens"):
        await table.whole(make_span(600))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt_ids": PROMPT[:0]}, "prompt_ids has 0 tokens"),
        ({"prompt_ids": PROMPT + VOCAB}, "prompt_ids.0. is 515"),
        ({"prompt_ids": np.zeros(601, np.int32)}, "601 tokens, the limit is 600"),
        ({"options": ScoreOptions(k=129)}, "k is 129, the limit is 128"),
        (
            {"policy": DriftPolicy(metric=OverlapRatio(k=17))},
            "drift k is 17, the limit is k, which is 16",
        ),
        ({"name": ""}, "session_id has 0 bytes"),
        ({"name": "x" * 257}, "session_id has 257 bytes"),
        ({"scored_ids": PROMPT}, "drift is missing"),
        ({"scored_ids": PROMPT, "drift_state": DriftState(num_tokens=4)}, "covers 4 tokens"),
        (
            {"scored_ids": PROMPT, "drift_state": DriftState(num_tokens=5, num_bad_events=6)},
            "6 bad events, must have 0..5",
        ),
        (
            {"scored_ids": PROMPT, "drift_state": DriftState(num_tokens=5, exhausted_at=3)},
            "exhausted_at 3",
        ),
    ],
)
async def test_hostile_opens_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        Table().open(**changes)
