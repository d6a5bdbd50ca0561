"""Sessions that grow against a teacher with stored rows: what a trainer does, without a student."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from benchmarks.stored_rows import PROMPT_TOKENS, Table
from teacher_client.client import TeacherClient
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.records import DriftPolicy, LogprobDtype, ScoreOptions, Scores, TokenSpan

PROMPT = np.arange(1, PROMPT_TOKENS + 1, dtype=np.int32)
POLICY = DriftPolicy(metric=OverlapRatio(k=16, threshold=0.5), stop_in_flight=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How one response is scored."""

    k: int
    dtype: LogprobDtype = LogprobDtype.F32
    append_tokens: int = 64
    candidates: bool = True
    """Send the student's top-k, and have it compared."""
    sessions: int = 8
    """Responses that grow at once."""

    def options(self) -> ScoreOptions:
        """What each row holds."""
        return ScoreOptions(k=self.k, logprob_dtype=self.dtype)

    def spans(self, table: Table) -> list[TokenSpan]:
        """The whole table in appends."""
        candidates = table.candidate_ids if self.candidates else None
        return [
            TokenSpan(
                offset=start,
                token_ids=table.token_ids[start : start + self.append_tokens],
                candidate_ids=None
                if candidates is None
                else candidates[start : start + self.append_tokens],
            )
            for start in range(0, len(table), self.append_tokens)
        ]


async def connect(address: str) -> TeacherClient:
    """A client that takes any teacher."""
    return await TeacherClient.connect(
        [address], tokenizer_fingerprint="", vocab_size=0, run_id="load"
    )


async def grow(client: TeacherClient, load: Load, table: Table) -> int:
    """Scores `load.sessions` responses side by side; returns the number of tokens."""
    counts = await asyncio.gather(*(_grow_one(client, load, table) for _ in range(load.sessions)))
    return sum(counts)


async def _grow_one(client: TeacherClient, load: Load, table: Table) -> int:
    session = client.open(PROMPT, load.options(), POLICY if load.candidates else None)
    for span in load.spans(table):
        scores = await session.append(span)
        _check(scores, span)
    await session.close()
    return session.num_scored


def _check(scores: Scores, span: TokenSpan) -> None:
    """The answer is that of this very span."""
    rows = scores.rows
    if rows.offset != span.offset or rows.topk_ids[-1, 0] != span.token_ids[-1]:
        raise AssertionError(f"rows at {rows.offset} do not answer the span at {span.offset}")
