"""Rows made beforehand: an engine that costs nothing, and the student's candidates to go with it.

What is left of an append is the service. Values are random; how far the student's top-k and the
teacher's agree is not (see `overlap`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_server.engine.base import EngineInfo, EngineRows, ScoreQuery
from teacher_wire.records import MODEL_COLUMNS, TokenSpan

VOCAB_SIZE = 151_936
PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """T rows as an engine would give them, and what a student would ask with."""

    token_ids: NDArray[np.int32]
    """[T]"""
    candidate_ids: NDArray[np.int32]
    """[T, K]"""
    rows: EngineRows

    def __len__(self) -> int:
        return len(self.token_ids)


def made_table(
    num_tokens: int, k: int, *, vocab_size: int = VOCAB_SIZE, overlap: float = 0.8, seed: int = 0
) -> Table:
    """Random rows: sorted log-probs, distinct ids, `overlap` of the candidates in the top-k."""
    rng = np.random.default_rng(seed)
    # Distinct in a row: one draw from each of 2k equal ranges of the vocabulary, in random order.
    stride = vocab_size // (2 * k)
    draws = rng.integers(0, stride, (num_tokens, 2 * k)) + np.arange(2 * k) * stride
    ids = rng.permuted(draws.astype(np.int32), axis=1)
    topk_ids, others = np.ascontiguousarray(ids[:, :k]), ids[:, k:]
    is_common = rng.random((num_tokens, k)) < overlap
    candidate_ids = rng.permuted(np.where(is_common, topk_ids, others), axis=1)
    logits = -np.sort(rng.exponential(2.0, (num_tokens, k)).cumsum(axis=1), axis=1)
    logprobs = (logits - np.log(1.5)).astype(np.float32)
    return Table(
        token_ids=topk_ids[:, 0].copy(),
        candidate_ids=np.ascontiguousarray(candidate_ids),
        rows=EngineRows(
            topk_ids=topk_ids,
            topk_logprobs=logprobs,
            token_logprobs=logprobs[:, 0].copy(),
            candidate_logprobs=rng.permuted(logprobs, axis=1),
            computed_tokens=num_tokens,
        ),
    )


def sliced(rows: EngineRows, start: int, stop: int, *, candidates: bool) -> EngineRows:
    """Rows start..stop as views, with or without log-probs at candidates."""
    # Not MODEL_COLUMNS.cut, which would count as the service's own work.
    given = zip(MODEL_COLUMNS.names, MODEL_COLUMNS.arrays(rows), strict=True)
    columns: dict[str, Any] = {n: a[start:stop] for n, a in given if a is not None}
    if not candidates:
        columns.pop("candidate_logprobs", None)
    return EngineRows(computed_tokens=stop - start, **columns)


def rows_of(table: Table, span: TokenSpan) -> EngineRows:
    """What an engine would answer for a span of the table."""
    stop = span.offset + len(span)
    return sliced(table.rows, span.offset, stop, candidates=span.candidate_ids is not None)


class StoredEngine:
    """Answers with slices of tables, by position in the response and by k."""

    def __init__(self, tables: dict[int, Table], *, max_context: int = 1 << 20) -> None:
        """Every prompt has PROMPT_TOKENS tokens, and no response is longer than its table."""
        self._tables = tables
        self._info = EngineInfo(
            name="stored",
            version="1",
            dtype="float32",
            vocab_size=VOCAB_SIZE,
            max_context=max_context,
            max_k=max(tables),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        """Nothing to load."""

    async def score(self, query: ScoreQuery) -> EngineRows:
        start, stop = query.first_row - PROMPT_TOKENS, len(query.token_ids) - PROMPT_TOKENS
        return sliced(
            self._tables[query.k].rows, start, stop, candidates=query.candidate_ids is not None
        )

    def forget(self, session: str) -> None:
        """Nothing is held."""

    async def healthy(self) -> bool:
        return True

    def kv_used_ratio(self) -> float | None:
        return None

    def kv_capacity_tokens(self) -> int | None:
        return None

    async def close(self) -> None:
        """Nothing is held."""
