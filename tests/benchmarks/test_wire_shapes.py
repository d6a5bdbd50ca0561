"""A replica carries the rows it is given: pytest tests/benchmarks/test_wire_shapes.py"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.stored_rows import PROMPT_TOKENS, StoredEngine, made_table
from benchmarks.wire_shapes import SHAPES, Shape
from teacher_server.engine.base import ScoreQuery, check_finite
from teacher_wire.drift_metrics import overlap_counts


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_goes_there_and_back(shape: Shape) -> None:
    table = made_table(20, 8)
    decoded = shape.decode(shape.encode(table.rows, table.token_ids))
    if decoded.topk_ids is not None:
        np.testing.assert_array_equal(decoded.topk_ids, table.rows.topk_ids)
    np.testing.assert_array_equal(decoded.topk_logprobs, table.rows.topk_logprobs)
    np.testing.assert_array_equal(decoded.token_logprobs, table.rows.token_logprobs)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("vllm_json", 2375),
        ("sglang_json", 1080),
        ("trl_json", 921),
        ("trl_b64", 352),
        ("npy_b64", 171),
        ("smg_proto", 236),
    ],
)
def test_a_shape_is_as_large_as_the_real_one(name: str, bytes_per_token: int) -> None:
    """At K = 32 and a vocabulary of 151,936, within an eighth: log-probs differ in their digits."""
    table = made_table(512, 32)
    (shape,) = (shape for shape in SHAPES if shape.name == name)
    size = len(shape.encode(table.rows, table.token_ids)) / 512
    assert size == pytest.approx(bytes_per_token, rel=0.125)


async def test_stored_rows_are_what_an_engine_promises() -> None:
    table = made_table(64, 16, overlap=0.75)
    assert all(len(set(row)) == 16 for row in table.rows.topk_ids.tolist())
    shares = overlap_counts(table.candidate_ids, table.rows.topk_ids) / 16
    assert shares.mean() == pytest.approx(0.75, abs=0.05)
    query = ScoreQuery(
        token_ids=np.concatenate([np.zeros(PROMPT_TOKENS, np.int32), table.token_ids[:40]]),
        first_row=PROMPT_TOKENS + 30,
        candidate_ids=table.candidate_ids[30:40],
        k=16,
        temperature=1.0,
    )
    rows = await StoredEngine({16: table}).score(query)
    check_finite(rows, query.first_row)
    np.testing.assert_array_equal(rows.topk_ids, table.rows.topk_ids[30:40])
    assert (np.diff(rows.topk_logprobs, axis=1) <= 0).all()
