"""Whole texts of which every token but the first is scored, as clients send them that know no
session: the longest beginning whose rows are kept is not scored again.

Knows no transport. Fairness, limits and what is refused are the session table's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_server.metrics.server import Metrics
from teacher_server.scoring.kept_rows import KeptRows, block_keys
from teacher_server.scoring.sessions import SessionTable
from teacher_wire.columns import CANDIDATE_IDS, Width
from teacher_wire.records import MODEL_COLUMNS, ModelRows, ScoreOptions, Timing, TokenSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScores:
    """The rows of a text, and what they took."""

    rows: ModelRows
    """Row t is that of token first_row + t."""
    num_kept: int
    """Rows that were kept from earlier calls."""
    timing: Timing


class Texts:
    """Scores whole texts of one server."""

    def __init__(self, sessions: SessionTable, *, metrics: Metrics, max_bytes: int) -> None:
        """At most max_bytes of rows are kept; 0: none."""
        self._sessions = sessions
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._kept = KeptRows(max_bytes, forget=self._forget)
        self._names = itertools.count()

    async def score(
        self,
        token_ids: NDArray[np.int32],
        options: ScoreOptions,
        *,
        tenant: str,
        first_row: int = 1,
        candidate_ids: NDArray[np.int32] | None = None,
    ) -> TextScores:
        """The rows of token_ids[first_row:], each given the tokens before it.

        `candidate_ids` has a row for each of them. Rows are kept and found only where all are asked
        for (first_row 1). Raises as SessionTable.append.
        """
        if first_row >= len(token_ids):
            width = 0 if candidate_ids is None else candidate_ids.shape[1]
            return TextScores(rows=_no_rows(options, width), num_kept=0, timing=Timing())
        if first_row > 1 or not self._max_bytes:
            return await self._fresh(token_ids, options, tenant, first_row, candidate_ids)
        keys = block_keys(tenant, options, token_ids, candidate_ids)
        kept, name = self._kept.take(tenant, keys)
        num_kept = sum(map(len, kept))
        name = name or f"text-{next(self._names)}"
        timing = Timing()
        if num_kept + 1 < len(token_ids):
            scores = await self._sessions.score_once(
                token_ids[: num_kept + 1],
                _span(token_ids, num_kept + 1, candidate_ids, num_kept),
                options,
                None,
                tenant=tenant,
                keep_as=name,
            )
            kept.append(scores.rows)
            timing = scores.timing
        rows = ModelRows(**MODEL_COLUMNS.joined(kept))
        self._kept.keep(tenant, keys, rows, name)
        self._metrics.text_rows(num_kept, len(rows) - num_kept, self._kept.num_bytes)
        return TextScores(rows=rows, num_kept=num_kept, timing=timing)

    async def _fresh(
        self,
        token_ids: NDArray[np.int32],
        options: ScoreOptions,
        tenant: str,
        first_row: int,
        candidate_ids: NDArray[np.int32] | None,
    ) -> TextScores:
        span = _span(token_ids, first_row, candidate_ids, 0)
        scores = await self._sessions.score_once(
            token_ids[:first_row], span, options, None, tenant=tenant
        )
        self._metrics.text_rows(0, len(scores.rows), self._kept.num_bytes)
        return TextScores(rows=scores.rows, num_kept=0, timing=scores.timing)

    def _forget(self, tenant: str, name: str) -> None:
        self._sessions.drop(name, tenant=tenant)


def _span(
    token_ids: NDArray[np.int32],
    first: int,
    candidate_ids: NDArray[np.int32] | None,
    first_candidates: int,
) -> TokenSpan:
    candidates = None if candidate_ids is None else candidate_ids[first_candidates:]
    return TokenSpan(offset=0, token_ids=token_ids[first:], candidate_ids=candidates)


def _no_rows(options: ScoreOptions, width: int) -> ModelRows:
    """As many rows as a single token has."""
    shapes = {Width.ONE: (0,), Width.TOP_K: (0, options.k), Width.CANDIDATES: (0, width)}
    asked = {"", *([CANDIDATE_IDS] if width else [])}
    columns: dict[str, Any] = {
        column.name: np.zeros(shapes[column.width], column.in_memory)
        if column.asked_by in asked or column.name in options.extras
        else None
        for column in MODEL_COLUMNS
    }
    return ModelRows(**columns)
