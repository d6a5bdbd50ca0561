"""A scored response in columns: what the teacher thinks of each token, and what a drift policy
makes of it. Knows records; knows no transport, no text and no thresholds of its own.

Alignment: entry t is response token t; its log-prob, rank and top-K are those of the teacher given
the prompt and the response tokens before t. Reliability R_t already counts a bad event at t.

Legend: T = response tokens, K = the teacher's top-k as asked for, C = candidates a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_server.scoring.judging import judged_rows
from teacher_wire import drift
from teacher_wire.drift_metrics import MAX_DRIFT_K
from teacher_wire.records import (
    MODEL_COLUMNS,
    DriftPolicy,
    DriftState,
    ModelRows,
    TokenSpan,
    Verdict,
)
from teacher_wire.report_columns import in_report

Columns = dict[str, NDArray[Any] | None]


def model_columns(rows: ModelRows, span: TokenSpan, k: int) -> Columns:
    """What the model says of the tokens of a span; of each top-k the first k entries."""
    shown: Columns = {
        "teacher_logprobs": rows.token_logprobs,
        "teacher_topk_ids": np.ascontiguousarray(rows.topk_ids[:, :k]),
        "teacher_topk_logprobs": np.ascontiguousarray(rows.topk_logprobs[:, :k]),
        "candidate_ids": span.candidate_ids,
        "teacher_logprobs_at_candidates": rows.candidate_logprobs,
    }
    for column in MODEL_COLUMNS.extras:
        shown[in_report(column)] = getattr(rows, column.name)
    return shown


@dataclass(slots=True)
class Judge:
    """One drift policy, or none, over the pieces of one response as they come."""

    policy: DriftPolicy | None
    _state: DriftState = field(default_factory=DriftState)
    _bad: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    _verdict: Verdict = Verdict.CONTINUE
    _keep_tokens: int | None = None

    def columns(self, rows: ModelRows, span: TokenSpan) -> Columns:
        """overlap, bad_events and reliability of the next piece; None where nothing asks for it.

        The overlap is a share of what is compared: the policy's k, or all that both have.
        """
        judged = judged_rows(rows, span, self.policy)
        overlap = None
        if judged.overlap_counts is not None and span.candidate_ids is not None:
            limit = MAX_DRIFT_K if self.policy is None else self.policy.metric.k
            widths = (rows.topk_ids.shape[1], span.candidate_ids.shape[1], limit)
            overlap = (judged.overlap_counts / min(widths)).astype(np.float32)
        reliability = None
        if self.policy is not None and judged.bad_events is not None:
            before, bad = self._state, judged.bad_events
            self._state, self._verdict, self._keep_tokens = drift.advance(self.policy, before, bad)
            self._bad = np.concatenate([self._bad, bad])
            reliability = drift.reliability(self.policy.w_drop, self._bad)[before.num_tokens :]
        return {"overlap": overlap, "bad_events": judged.bad_events, "reliability": reliability}

    def summary(self) -> dict[str, Any]:
        """What follows from all pieces; None where there is no policy."""
        has = self.policy is not None
        return {
            "num_bad_events": self._state.num_bad_events if has else None,
            "exhausted_at": self._state.exhausted_at,
            "verdict": self._verdict.value,
            "keep_tokens": self._keep_tokens,
            "policy": policy_to_json(self.policy),
        }


def policy_to_json(policy: DriftPolicy | None) -> dict[str, Any] | None:
    """The constants of the metric beside those of all metrics."""
    if policy is None:
        return None
    return {**asdict(policy), "metric": policy.metric.name, **asdict(policy.metric)}


def ids_in(*arrays: NDArray[Any] | None) -> list[int]:
    """Every id that occurs, ascending."""
    present = [array.ravel() for array in arrays if array is not None]
    return np.unique(np.concatenate(present)).tolist() if present else []


def blocks(columns: Columns, num_rows: int, size: int) -> Iterator[tuple[int, Columns]]:
    """The rows in consecutive blocks of at most `size`, each with the place of its first."""
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        cut = {name: None if array is None else array[rows] for name, array in columns.items()}
        yield start, cut
