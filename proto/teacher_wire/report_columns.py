"""What the columns of an analysis are called: in a report, one array a column, and in a table of
one row a token. Pure.
"""

from __future__ import annotations

from teacher_wire.columns import Column
from teacher_wire.records import MODEL_COLUMNS


def in_report(column: Column) -> str:
    """The name of a column that an option asks for: entropies, ranks."""
    return column.name.removeprefix("token_")


IN_TABLE: dict[str, str] = {
    "response_ids": "token_id",
    "teacher_logprobs": "teacher_logprob",
    "teacher_topk_ids": "teacher_topk_ids",
    "teacher_topk_logprobs": "teacher_topk_logprobs",
    "candidate_ids": "candidate_ids",
    "teacher_logprobs_at_candidates": "teacher_logprobs_at_candidates",
    **{in_report(column): column.singular for column in MODEL_COLUMNS.extras},
    "overlap": "overlap",
    "bad_events": "bad_event",
    "reliability": "reliability",
}
"""The name in a table, by that in a report; in the order of both."""
