"""The seam between service and model: tokens and candidate ids in, rows out. Free of torch.

Legend: L = prompt plus response tokens, n = rows, K = top-k, C = candidate ids a row.

An engine is stateless by contract: every query carries the whole prefix. Reuse of earlier work is the
engine's own affair (vLLM: the prefix cache; transformers: a KV cache per `session`), and never changes
a row beyond rounding. Logits never leave an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


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
    want_entropy: bool = False
    want_rank: bool = False
    session: str | None = None
    """Hint: queries with the same name grow the same prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRows:
    """What a model says of n tokens. Finite by contract: an engine raises NonFiniteError instead."""

    topk_ids: NDArray[np.int32]
    """[n, K] most likely first."""
    topk_logprobs: NDArray[np.float32]
    """[n, K]"""
    token_logprobs: NDArray[np.float32]
    """[n]"""
    candidate_logprobs: NDArray[np.float32] | None
    """[n, C]"""
    entropies: NDArray[np.float32] | None
    """[n] nats"""
    token_ranks: NDArray[np.int32] | None
    """[n] 1 = most likely"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine serves, known before it is started."""

    name: str
    version: str
    dtype: str
    vocab_size: int
    max_context: int
    max_k: int


class ScoringEngine(Protocol):
    """Scores tokens under one fixed model."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self) -> None:
        """Loads the model; raises EngineError when it cannot."""

    async def score(self, query: ScoreQuery) -> EngineRows:
        """Rows of one query. Concurrent calls are batched. Raises EngineError or NonFiniteError."""

    def forget(self, session: str) -> None:
        """Drops what is held for a session; a later query of it is still answered, only slower."""

    async def healthy(self) -> bool:
        """False once the engine cannot score any more."""

    async def close(self) -> None:
        """Frees the model and ends the engine's processes."""
