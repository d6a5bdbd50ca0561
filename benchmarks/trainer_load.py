"""A trainer as its teacher sees it: sessions that grow side by side, without a student.

python -m benchmarks.trainer_load ADDRESS NAME VOCABULARY K
    answers each question {"job": ..., "start_at": seconds of the monotonic clock} with the appends
    it made; one JSON object a line
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.arms.base import Job, Text, made_texts
from benchmarks.arms.driftline import POLICY, span
from teacher_client.client import TeacherClient
from teacher_wire.records import LogprobDtype, ScoreOptions


@dataclass(frozen=True, slots=True)
class Append:
    """One answered append."""

    sent: float
    """Seconds of the machine's monotonic clock, which its processes share."""
    answered: float
    queue_s: float
    """Waiting for the engine, in the server."""
    engine_s: float
    rows: int


async def appends(client: TeacherClient, text: Text, job: Job, k: int) -> list[Append]:
    """Grows one response; a single piece goes through the Score call."""
    options = ScoreOptions(k=k, logprob_dtype=LogprobDtype.F16)
    pieces, made = job.pieces(), []
    session = None if len(pieces) == 1 else client.open(text.prompt_ids, options, POLICY)
    for start, end in pieces:
        piece = span(text, start, end)
        sent = time.monotonic()
        if session is None:
            scores = await client.score(text.prompt_ids, piece, options, POLICY)
        else:
            scores = await session.append(piece)
        timing = scores.timing
        made.append(
            Append(
                sent,
                time.monotonic(),
                timing.queue_us / 1e6,
                timing.engine_us / 1e6,
                len(scores.rows),
            )
        )
    if session is not None:
        await session.close()
    return made


@asynccontextmanager
async def _connected(
    address: str, name: str, vocab_size: int, k: int
) -> AsyncIterator[Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]:
    client = await TeacherClient.connect(
        [address], tokenizer_fingerprint="", vocab_size=vocab_size, run_id=name
    )

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        job = Job(**question["job"])
        texts = made_texts(job, vocab_size=vocab_size, k=k)
        await asyncio.sleep(question["start_at"] - time.monotonic())
        made = await asyncio.gather(*(appends(client, text, job, k) for text in texts))
        fields = Append.__dataclass_fields__
        return {"appends": [[getattr(a, f) for f in fields] for many in made for a in many]}

    try:
        yield answer
    finally:
        await client.aclose()


if __name__ == "__main__":
    from benchmarks.processes import answer_lines

    where, who, size, width = sys.argv[1:]
    asyncio.run(answer_lines(_connected(where, who, int(size), int(width))))
