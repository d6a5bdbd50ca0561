"""A start-up check: an engine that scores pieces otherwise than the whole must not serve.

It catches what would otherwise train a student on wrong numbers: rows shifted against tokens, a
prefix cache that changes results, a temperature that is ignored. Free of torch.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from teacher_server.engine.base import EngineRows, ScoreQuery, ScoringEngine
from teacher_wire.errors import EngineError

NUM_TOKENS = 160
NUM_PIECES = 5
TEMPERATURES = (1.0, 0.7)
TOLERANCES_NATS = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.75}
"""Largest difference of a log-prob. A bfloat16 logit between 16 and 32 is rounded to 1/8, and
batches of another shape sum in another order."""


async def self_test(engine: ScoringEngine) -> float:
    """Scores random tokens in one go and in pieces; returns the largest difference in nats.

    Raises EngineError when it exceeds the tolerance of the engine's dtype.
    """
    info = engine.info
    tolerance = TOLERANCES_NATS[info.dtype]
    worst = 0.0
    for seed, temperature in enumerate(TEMPERATURES):
        rng = np.random.default_rng(seed)
        num_tokens = min(NUM_TOKENS, info.max_context)
        token_ids = rng.integers(0, info.vocab_size, num_tokens, dtype=np.int32)
        cuts = np.sort(rng.choice(np.arange(2, num_tokens), NUM_PIECES - 1, replace=False))
        bounds = [1, *cuts.tolist(), num_tokens]
        # Once the whole comes first and once the pieces, so that each meets an empty prefix cache.
        if seed == 0:
            whole = await _score(engine, token_ids, [1, num_tokens], temperature)
            pieces = await _score(engine, token_ids, bounds, temperature)
        else:
            pieces = await _score(engine, token_ids, bounds, temperature)
            whole = await _score(engine, token_ids, [1, num_tokens], temperature)
        worst = max(worst, _largest_difference(whole, pieces))
    flatter = await _score(engine, token_ids, [1, num_tokens], 2 * temperature)
    worst = max(worst, _temperature_error(whole, flatter, ratio=2.0))
    if not worst <= tolerance:
        raise EngineError(
            f"self-test of {info.name}: scores in one go and in pieces, or at two temperatures, "
            f"differ by {worst:.4g} nats; {info.dtype} allows {tolerance:g}"
        )
    return worst


async def _score(
    engine: ScoringEngine, token_ids: NDArray[np.int32], bounds: list[int], temperature: float
) -> list[EngineRows]:
    """Scores token_ids[bounds[0]:bounds[-1]] as a session that grows from bound to bound."""
    k = min(8, engine.info.max_k)
    answers: list[EngineRows] = []
    for first_row, end in itertools.pairwise(bounds):
        query = ScoreQuery(
            token_ids=token_ids[:end],
            first_row=first_row,
            # The targets shifted by one row: unlikely tokens, different in each row.
            candidate_ids=token_ids[first_row - 1 : end - 1, None],
            k=k,
            temperature=temperature,
            session=f"self-test-{temperature}-{len(bounds)}",
        )
        answers.append(await engine.score(query))
    engine.forget(f"self-test-{temperature}-{len(bounds)}")
    return answers


def _logprobs(answers: list[EngineRows]) -> NDArray[np.float32]:
    """[n, K + 2] all log-probs of consecutive answers."""
    tables: list[NDArray[np.float32]] = []
    for rows in answers:
        if rows.candidate_logprobs is None:
            raise EngineError("self-test: the engine returned no log-probs of the candidates")
        columns = [rows.topk_logprobs, rows.token_logprobs, rows.candidate_logprobs]
        tables.append(np.column_stack(columns))
    return np.concatenate(tables)


def _largest_difference(whole: list[EngineRows], pieces: list[EngineRows]) -> float:
    return float(np.abs(_logprobs(whole) - _logprobs(pieces)).max())


def _temperature_error(rows: list[EngineRows], flatter: list[EngineRows], ratio: float) -> float:
    """Differences of two log-probs of one row must shrink by the ratio of the temperatures."""
    gaps, flatter_gaps = (
        answer - answer[:, :1] for answer in (_logprobs(rows), _logprobs(flatter))
    )
    return float(np.abs(gaps - ratio * flatter_gaps).max())
