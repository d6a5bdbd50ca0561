"""From an engine's rows to a client's: checked, judged by the drift policy, cut and joined.

Knows no session and no transport.
"""

from __future__ import annotations

import math

from teacher_server.engine.base import EXTRAS, EngineRows, ScoreQuery
from teacher_wire import drift
from teacher_wire.drift_metrics import MAX_DRIFT_K, overlap_counts
from teacher_wire.errors import EngineError, NonFiniteError
from teacher_wire.records import (
    MODEL_COLUMNS,
    DriftPolicy,
    ModelRows,
    ScoreRows,
    Scores,
    Timing,
    TokenSpan,
    concat_rows,
)

_CHECKED = tuple((column.name, column.width, column.is_float) for column in MODEL_COLUMNS)
"""What check_rows asks of each column."""


def check_rows(rows: EngineRows, query: ScoreQuery) -> None:
    """An engine's promise, checked: the shapes asked for, and no number that is not finite."""
    n = len(query.token_ids) - query.first_row
    candidates = query.candidate_ids
    shapes: tuple[tuple[int, ...] | None, ...] = (
        (n,),
        (n, query.k),
        None if candidates is None else (n, candidates.shape[1]),
    )
    unasked = EXTRAS - query.extras
    for (name, width, is_float), array in zip(_CHECKED, MODEL_COLUMNS.arrays(rows), strict=True):
        shape = None if name in unasked else shapes[width]
        if array is None:
            if shape is not None:
                raise EngineError(f"the engine's {name} is missing, must be {shape}")
        elif array.shape != shape:
            raise EngineError(f"the engine's {name} has shape {array.shape}, must be {shape}")
        # A sum of log-probs or entropies is finite if all of them are.
        elif is_float and not math.isfinite(array.sum()):
            raise NonFiniteError(f"the engine's {name} holds a NaN or an infinity")


def judged_rows(rows: ModelRows, span: TokenSpan, policy: DriftPolicy | None) -> ScoreRows:
    """A model's rows with overlap and bad events."""
    overlaps = bad = None
    if span.candidate_ids is not None:
        widths = (span.candidate_ids.shape[1], rows.topk_ids.shape[1], MAX_DRIFT_K)
        depth = min(widths) if policy is None else min(policy.metric.k, *widths)
        overlaps = overlap_counts(span.candidate_ids[:, :depth], rows.topk_ids[:, :depth])
    if policy is not None:
        bad = drift.bad_events(
            policy,
            token_ids=span.token_ids,
            rows=rows,
            overlaps=overlaps,
            event_mask=span.event_mask,
        )
    return ScoreRows(
        offset=span.offset, overlap_counts=overlaps, bad_events=bad, **MODEL_COLUMNS.by_name(rows)
    )


def pieces(span: TokenSpan, size: int) -> list[TokenSpan]:
    """The span in consecutive pieces of at most `size` tokens; an empty span is one piece."""
    parts = []
    for start in range(0, len(span), size):
        rows = slice(start, start + size)
        parts.append(
            TokenSpan(
                offset=span.offset + start,
                token_ids=span.token_ids[rows],
                candidate_ids=None if span.candidate_ids is None else span.candidate_ids[rows],
                event_mask=None if span.event_mask is None else span.event_mask[rows],
            )
        )
    return parts or [span]


def joined(parts: list[Scores]) -> Scores:
    """One answer out of those to consecutive pieces."""
    final = parts[-1]
    return Scores(
        rows=concat_rows([part.rows for part in parts]),
        drift=final.drift,
        verdict=final.verdict,
        keep_tokens=final.keep_tokens,
        timing=Timing(
            queue_us=sum(part.timing.queue_us for part in parts),
            engine_us=sum(part.timing.engine_us for part in parts),
            computed_tokens=sum(part.timing.computed_tokens or 0 for part in parts),
        ),
    )
