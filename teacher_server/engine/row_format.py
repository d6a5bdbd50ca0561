"""The bytes between an engine's front end and its worker: what to score, and the packed answer.

Free of torch and vLLM, so that both ends may import it. Legend as in base.py; S = submitted tokens,
W = columns of a packed answer.

Alignment: the row of token i comes from the hidden state of token i - 1. The prefix cache works in
whole blocks, so a query whose end completes a block submits that last token too (S = L, else
S = L - 1): the block is then cached, and the next append computes none of it again. What that
append needs of it, the hidden state of its last token, the worker keeps under the digest of the
text; where it has been dropped the block is computed once more.

A packed answer is int32 [rows, W], W = HEADER + 2K + C: position, token log-prob, the extras in
their order (0 where nobody asks), top-K ids, top-K log-probs, candidate log-probs; floats are bit
patterns of float32. Its rows start where the prefix cache ended, so there may be fewer than were
asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_wire.id_ranges import IdRanges
from teacher_wire.records import MODEL_COLUMNS

ZERO_BLOCKS_VARIABLE = "DRIFTLINE_ZERO_KV_BLOCKS"
"""Tells the plugin that its process serves scores; it is loaded beside every vLLM engine."""

POSITION, TOKEN_LOGPROB = range(2)
EXTRA_AT = {column.name: i for i, column in enumerate(MODEL_COLUMNS.extras, start=2)}
"""Where each of the columns stands that a query may ask for."""
HEADER = 2 + len(EXTRA_AT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRequest:
    """What the worker must know beyond the submitted tokens."""

    first_row: int
    k: int
    temperature: float
    extras: frozenset[str]
    target_ids: NDArray[np.int32]
    """[n] the tokens to score, from first_row on."""
    candidate_ids: NDArray[np.int32]
    """[n, C], C = 0 without candidates."""
    excluded_ids: IdRanges = ()
    """That take no part."""
    before: bytes = b""
    """Digest of the text before first_row where that is whole blocks, else empty."""
    whole: bytes = b""
    """Digest of the whole text where that is whole blocks and a session may go on, else empty."""

    @classmethod
    def of_query(cls, query: ScoreQuery, block_size: int) -> RowRequest:
        target_ids = np.ascontiguousarray(query.token_ids[query.first_row :], dtype=np.int32)
        candidate_ids = query.candidate_ids
        if candidate_ids is None:
            candidate_ids = np.empty((len(target_ids), 0), dtype=np.int32)
        return cls(
            first_row=query.first_row,
            k=query.k,
            temperature=query.temperature,
            extras=query.extras,
            target_ids=target_ids,
            candidate_ids=np.ascontiguousarray(candidate_ids, dtype=np.int32),
            excluded_ids=query.excluded_ids,
            before=_digest(query.token_ids[: query.first_row], block_size),
            whole=_digest(query.token_ids, block_size) if query.session is not None else b"",
        )

    @classmethod
    def of_kwargs(cls, kwargs: dict[str, Any]) -> RowRequest:
        target_ids = np.frombuffer(kwargs["target_ids"], dtype=np.int32)
        candidate_ids = np.frombuffer(kwargs["candidate_ids"], dtype=np.int32)
        arrays: dict[str, Any] = {
            "extras": frozenset(kwargs["extras"]),
            "excluded_ids": tuple((start, end) for start, end in kwargs["excluded_ids"]),
            "target_ids": target_ids,
            "candidate_ids": candidate_ids.reshape(len(target_ids), -1),
        }
        return cls(**kwargs | arrays)

    def to_kwargs(self) -> dict[str, Any]:
        """Plain values that survive both pickle and msgpack."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "extras": sorted(self.extras),
            "target_ids": self.target_ids.tobytes(),
            "candidate_ids": self.candidate_ids.tobytes(),
        }

    @property
    def end(self) -> int:
        """One past the last token to score."""
        return self.first_row + len(self.target_ids)

    def boundaries(self) -> list[tuple[bytes, int]]:
        """Texts of whole blocks, and the index of the last token of each."""
        texts = [(self.before, self.first_row - 1), (self.whole, self.end - 1)]
        return [(text, position) for text, position in texts if text]

    def width(self) -> int:
        """Columns of the packed answer."""
        return HEADER + 2 * self.k + int(self.candidate_ids.shape[1])

    def until(self, end: int) -> RowRequest:
        """The same for the rows of the tokens before `end`."""
        num_rows = end - self.first_row
        return replace(
            self,
            target_ids=self.target_ids[:num_rows],
            candidate_ids=self.candidate_ids[:num_rows],
            whole=b"",
        )


def _digest(token_ids: NDArray[np.int32], block_size: int) -> bytes:
    """Names a text of whole blocks; empty for any other."""
    if len(token_ids) % block_size:
        return b""
    packed = np.ascontiguousarray(token_ids, np.int32).data
    return hashlib.blake2b(packed, digest_size=16).digest()


class RowCollector:
    """Puts packed answers, which may overlap, into the rows of one request."""

    def __init__(self, request: RowRequest) -> None:
        self._request = request
        num_rows = len(request.target_ids)
        self._packed_nW = np.empty((num_rows, request.width()), dtype=np.int32)
        self._filled_n = np.zeros(num_rows, dtype=np.bool_)
        self._computed_tokens = 0

    def add(self, packed_mW: NDArray[np.int32], computed_tokens: int) -> None:
        """The answer to one submission, and how many of its tokens the model was run on."""
        self._computed_tokens += computed_tokens
        index_m = packed_mW[:, POSITION] - self._request.first_row
        self._packed_nW[index_m] = packed_mW
        self._filled_n[index_m] = True

    def missing_end(self) -> int | None:
        """One past the last token whose row is missing; None when all rows are there."""
        missing = np.flatnonzero(~self._filled_n)
        return self._request.first_row + int(missing[-1]) + 1 if len(missing) else None

    def rows(self) -> EngineRows:
        request, packed_nW = self._request, self._packed_nW
        ids_end, logprobs_end = HEADER + request.k, HEADER + 2 * request.k
        places: dict[str, int | slice] = {
            "topk_ids": slice(HEADER, ids_end),
            "topk_logprobs": slice(ids_end, logprobs_end),
            "token_logprobs": TOKEN_LOGPROB,
            **{name: EXTRA_AT[name] for name in request.extras},
        }
        if request.candidate_ids.shape[1]:
            places["candidate_logprobs"] = slice(logprobs_end, None)
        return EngineRows(
            computed_tokens=self._computed_tokens,
            **{
                column.name: np.ascontiguousarray(
                    packed_nW.view(column.in_memory)[:, places[column.name]]
                )
                for column in MODEL_COLUMNS
                if column.name in places
            },
        )
