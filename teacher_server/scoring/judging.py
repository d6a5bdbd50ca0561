"""From an engine's rows to a client's: checked, judged by the drift policy, cut and joined.

Knows no session and no transport.
"""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray

from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_wire import drift
from teacher_wire.errors import EngineError, NonFiniteError
from teacher_wire.records import (
    MAX_DRIFT_K,
    DriftPolicy,
    ScoreRows,
    Scores,
    Timing,
    TokenSpan,
    concat_rows,
)


def check_rows(rows: EngineRows, query: ScoreQuery) -> None:
    """An engine's promise, checked: the shapes asked for, and no number that is not finite."""
    n = len(query.token_ids) - query.first_row
    num_candidates = 0 if query.candidate_ids is None else query.candidate_ids.shape[1]
    expected = {
        "topk_ids": (n, query.k),
        "topk_logprobs": (n, query.k),
        "token_logprobs": (n,),
        "candidate_logprobs": (n, num_candidates) if num_candidates else None,
        "entropies": (n,) if query.want_entropy else None,
        "token_ranks": (n,) if query.want_rank else None,
    }
    for name, shape in expected.items():
        array: NDArray[Any] | None = getattr(rows, name)
        got = None if array is None else array.shape
        if got != shape:
            raise EngineError(f"the engine's {name} has shape {got}, must be {shape}")
        # An integer is finite, and a sum of log-probs or entropies is if all of them are.
        if array is not None and array.dtype.kind == "f" and not math.isfinite(array.sum()):
            raise NonFiniteError(f"the engine's {name} holds a NaN or an infinity")


def judged_rows(rows: EngineRows, span: TokenSpan, policy: DriftPolicy | None) -> ScoreRows:
    """The engine's rows with overlap and bad events."""
    overlaps = bad = None
    if span.candidate_ids is not None:
        widths = (span.candidate_ids.shape[1], rows.topk_ids.shape[1], MAX_DRIFT_K)
        depth = min(widths) if policy is None else min(policy.k, *widths)
        overlaps = drift.overlap_counts(span.candidate_ids[:, :depth], rows.topk_ids[:, :depth])
    if policy is not None:
        bad = drift.bad_events(
            policy,
            token_ids=span.token_ids,
            topk_ids=rows.topk_ids,
            topk_logprobs=rows.topk_logprobs,
            overlaps=overlaps,
            event_mask=span.event_mask,
        )
    return ScoreRows(
        offset=span.offset,
        topk_ids=rows.topk_ids,
        topk_logprobs=rows.topk_logprobs,
        token_logprobs=rows.token_logprobs,
        candidate_logprobs=rows.candidate_logprobs,
        overlap_counts=overlaps,
        bad_events=bad,
        entropies=rows.entropies,
        token_ranks=rows.token_ranks,
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
