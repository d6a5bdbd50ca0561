"""The seam between service and model: tokens and candidate ids in, rows out. Free of torch.

Legend: L = prompt plus response tokens, n = rows, K = top-k, C = candidate ids a row.

An engine is stateless by contract: every query carries the whole prefix. Reuse of earlier work is
the engine's own affair (vLLM: the prefix cache; transformers: a KV cache per `session`), and never
changes a row beyond rounding. Logits never leave an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_wire.errors import InvalidRequestError, NonFiniteError
from teacher_wire.id_ranges import IdRanges, num_ids
from teacher_wire.records import MODEL_COLUMNS, ModelRows


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreQuery:
    """Asks for the rows of token_ids[first_row:], each given the tokens before it."""

    token_ids: NDArray[np.int32]
    """[L] prompt and response."""
    first_row: int
    """Index into token_ids of the first token to score, 1 <= first_row < L. n = L - first_row."""
    candidate_ids: NDArray[np.int32] | None
    """[n, C]"""
    k: int
    temperature: float
    extras: frozenset[str] = frozenset()
    """Names of the columns to answer besides those that every query gets, of EXTRAS."""
    excluded_ids: IdRanges = ()
    """Ids that take no part: their logits count as -inf before anything else is made of them. None
    of them is a target or a candidate."""
    session: str | None = None
    """Hint: queries with the same name grow the same prefix."""
    cache_salt: str = ""
    """Queries with different salts share no cached prefix: the time of an answer does not tell one
    tenant what another has asked."""


EXTRAS = frozenset(column.name for column in MODEL_COLUMNS.extras)
"""Every column that a query may ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRows(ModelRows):
    """The rows of one query. Finite by contract: engines raise NonFiniteError."""

    computed_tokens: int
    """Tokens the model was run on: the new ones, and those before them whose work was not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine serves, known before it is started."""

    name: str
    version: str
    dtype: str
    vocab_size: int
    max_context: int
    max_k: int
    block_tokens: int = 1
    """Reuse of earlier work ends at a multiple of this."""


def check_query(query: ScoreQuery, info: EngineInfo) -> None:
    """Raises InvalidRequestError for a query that would crash a model or be answered wrongly."""
    length = len(query.token_ids)
    if not 1 <= query.first_row < length:
        raise InvalidRequestError(f"first_row is {query.first_row}, must be in [1, {length})")
    if length > info.max_context:
        raise InvalidRequestError(f"{length} tokens, max_context is {info.max_context}")
    max_k = min(info.max_k, info.vocab_size - num_ids(query.excluded_ids))
    if not 1 <= query.k <= max_k:
        raise InvalidRequestError(f"k is {query.k}, must be in [1, {max_k}]")
    if not 0.0 < query.temperature < float("inf"):
        raise InvalidRequestError(f"temperature is {query.temperature}, must be finite and > 0")
    _check_ids("token_ids", query.token_ids, info.vocab_size)
    if query.candidate_ids is None:
        return
    num_rows = length - query.first_row
    shape = query.candidate_ids.shape
    if len(shape) != 2 or shape[0] != num_rows or not 1 <= shape[1] <= info.max_k:
        raise InvalidRequestError(
            f"candidate_ids has shape {shape}, must be [{num_rows}, C] with C in [1, {info.max_k}]"
        )
    _check_ids("candidate_ids", query.candidate_ids, info.vocab_size)


def _check_ids(name: str, ids: NDArray[np.int32], vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(f"{name} spans [{low}, {high}], must lie in [0, {vocab_size})")


def check_finite(rows: EngineRows, first_row: int) -> None:
    """Raises NonFiniteError naming the first token whose row holds a NaN or an infinity."""
    finite_n = np.ones(len(rows), np.bool_)
    for array in MODEL_COLUMNS.arrays(rows):
        if array is not None and array.dtype.kind == "f":
            finite_n &= np.isfinite(array.reshape(len(rows), -1)).all(axis=1)
    if not finite_n.all():
        index = first_row + int(np.argmin(finite_n))
        raise NonFiniteError(f"the model's scores of token {index} are not finite")


class ScoringEngine(Protocol):
    """Scores tokens under one fixed model."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self) -> None:
        """Loads the model; raises EngineError when it cannot."""

    async def score(self, query: ScoreQuery) -> EngineRows:
        """Rows of one query. Concurrent calls are batched. Raises EngineError or NonFiniteError,
        or MemoryError when this query was too much and the next may be answered."""

    def forget(self, session: str) -> None:
        """Drops what is held for a session; a later query of it is still answered, only slower."""

    async def healthy(self) -> bool:
        """False once the engine cannot score any more, or EngineError that says why."""

    def kv_used_ratio(self) -> float | None:
        """Share of the room for KV that is taken, 0 to 1; None when the engine does not tell."""

    def kv_capacity_tokens(self) -> int | None:
        """Tokens whose keys and values fit into the cache; None when the engine does not tell."""

    async def close(self) -> None:
        """Frees the model and ends the engine's processes."""
