"""Random queries against the tiny checkpoints, and what it means for two engines to agree."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from teacher_server.engine.base import EXTRAS, EngineRows, ScoreQuery, ScoringEngine
from teacher_wire.records import MODEL_COLUMNS
from tests.teacher.engine.engine_models import VOCAB_SIZE

TOLERANCE = 1e-4
"""Nats. In float32 vLLM and transformers differ by summation order alone: 1e-5 was seen."""
NAN_TOKEN_ID = 0
"""Not among the tokens of the self-test; its embedding is NaN, its logit is not."""
K, C = 8, 4


def random_ids(seed: int, num_tokens: int) -> NDArray[np.int32]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, VOCAB_SIZE, num_tokens, dtype=np.int32)


def a_query(token_ids: NDArray[np.int32], first_row: int, **options: object) -> ScoreQuery:
    """Candidates follow from the tokens, so that pieces and the whole ask for the same ones."""
    offsets_C = np.arange(1, C + 1, dtype=np.int32) * 37
    query = ScoreQuery(
        token_ids=token_ids,
        first_row=first_row,
        candidate_ids=(token_ids[first_row:, None] + offsets_C) % VOCAB_SIZE,
        k=K,
        temperature=1.0,
        extras=EXTRAS,
    )
    return replace(query, **options)


async def grow(
    engine: ScoringEngine, token_ids: NDArray[np.int32], bounds: list[int], **options: object
) -> EngineRows:
    """Rows of token_ids[bounds[0]:bounds[-1]], asked for from bound to bound."""
    answers = [
        await engine.score(a_query(token_ids[:end], first_row, **options))
        for first_row, end in itertools.pairwise(bounds)
    ]
    return EngineRows(
        computed_tokens=sum(answer.computed_tokens for answer in answers),
        **MODEL_COLUMNS.joined(answers),
    )


def assert_same_rows(
    rows: EngineRows, expected: EngineRows, *, tolerance: float = TOLERANCE
) -> None:
    for name in (column.name for column in MODEL_COLUMNS if column.is_float):
        got, want = getattr(rows, name), getattr(expected, name)
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= tolerance, name
    # Ids and ranks may differ where two tokens are equally likely to within the tolerance.
    gaps = -np.diff(expected.topk_logprobs, axis=1)
    clear = np.minimum(gaps[:, :-1], gaps[:, 1:]) > 2 * tolerance
    assert clear.mean() > 0.9
    same_ids = rows.topk_ids == expected.topk_ids
    assert same_ids[:, 1:-1][clear].all()
    assert np.mean(rows.token_ranks != expected.token_ranks) < 0.02
    assert np.abs(rows.token_ranks - expected.token_ranks).max() <= 1


def random_bounds(rng: np.random.Generator, first: int, end: int, num_pieces: int) -> list[int]:
    cuts = rng.choice(np.arange(first + 1, end), num_pieces - 1, replace=False)
    return [first, *np.sort(cuts).tolist(), end]
