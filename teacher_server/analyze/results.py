"""Scored rollouts as rows of the recorded schema, and as what a report is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from rollout_records.measures import overlap_depth, reliability_of, reverse_kl, with_means
from run_report.figures import RunFigures, TokenPieces
from teacher_server.analyze.rows import Given
from teacher_wire.records import DriftPolicy, Scores

UNKNOWN = "unknown"
"""How a rollout ended of which nobody said."""


def scored_row(
    row: Given, number: int, scores: Scores, policy: DriftPolicy | None
) -> dict[str, Any]:
    """Column -> value. What was not given, and no teacher can say, is not there."""
    rows, state = scores.rows, scores.drift
    recorded: dict[str, Any] = {
        "step": 0,
        "index": number,
        "prompt_id": row.where,
        "finish": UNKNOWN,
        "num_generated": len(row.response_ids),
        **row.others,
        "prompt": row.prompt,
        "response": row.response,
        "verdict": scores.verdict.value,
        "num_tokens": len(row.response_ids),
        "num_bad_events": None if state is None else state.num_bad_events,
        "exhausted_at": None if state is None else state.exhausted_at,
        "prompt_ids": row.prompt_ids,
        "response_ids": row.response_ids,
        "mask": row.mask,
        "sampled": row.sampled,
        "behavior_logprobs": row.behavior_logprobs,
        "teacher_logprobs": rows.token_logprobs,
        "bad_events": rows.bad_events,
        "reliability": reliability_of(policy, rows.bad_events),
        "entropies": rows.entropies,
        "ranks": rows.token_ranks,
        "teacher_topk_ids": rows.topk_ids,
        "teacher_topk_logprobs": rows.topk_logprobs,
    }
    if row.candidate_ids is not None and rows.candidate_logprobs is not None:
        depth = overlap_depth(rows.topk_ids.shape[1], row.candidate_ids.shape[1], policy)
        recorded["student_topk_ids"] = row.candidate_ids
        recorded["teacher_logprobs_at_student_topk"] = rows.candidate_logprobs
        if rows.overlap_counts is not None:
            recorded["overlap"] = rows.overlap_counts / depth
        if row.candidate_logprobs is not None:
            recorded["student_topk_logprobs"] = row.candidate_logprobs
            recorded["reverse_kl"] = reverse_kl(row.candidate_logprobs, rows.candidate_logprobs)
    return with_means(recorded)


def figures(
    name: str,
    table: pa.Table,
    *,
    about: Sequence[tuple[str, str]],
    pieces: TokenPieces | None,
    notes: Sequence[str],
) -> RunFigures:
    """Of a file of rollouts: there are no steps, only these."""
    return RunFigures(name=name, about=about, rollouts=table, pieces=pieces, notes=notes)
