"""What one append costs the service apart from the engine, in figures that no load can move.

python -m tests.benchmarks.overhead            prints them beside those on record
python -m tests.benchmarks.overhead --record   puts them on record, in overhead.json
python -m tests.benchmarks.overhead --json     prints them alone

The figures: bytecode instructions of our own code, Python calls of everybody's, the peak of what is
allocated, and the CPU time of the arithmetic in between relative to a reference of the same kind.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from benchmarks.service_load import POLICY, PROMPT, Load, connect
from benchmarks.stored_rows import StoredEngine, Table, made_table
from teacher_client.client import TeacherClient
from teacher_server.engine.base import ScoreQuery
from teacher_server.scoring.judging import check_rows, judged_rows
from teacher_server.scoring.validation import check_span
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire import codec
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import DriftState, Scores, TeacherInfo, Timing, TokenSpan, Verdict

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / name) for name in ("teacher_server", "student_trainer", "proto"))
RECORD = Path(__file__).with_suffix(".json")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
K, SHORT, LONG = 32, 64, 512
"""Tokens of an append, and of one that shows what grows with them."""
APPENDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Figures of one append of SHORT tokens, and what a token more adds."""

    instructions_per_append: float
    """Bytecode instructions in our packages, both ends."""
    calls_per_append: float
    """Python functions entered, grpc's and asyncio's included."""
    instructions_per_token: float
    peak_bytes_per_token: float
    """Of memory allocated during an append."""
    cpu_over_reference: float
    """Of the way from an append's bytes to its answer's arrays."""


@dataclass(slots=True)
class _Counts:
    instructions: int = 0
    calls: int = 0


class _Tracer:
    """Counts while it is installed; one thread."""

    def __init__(self) -> None:
        self.counts = _Counts()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        self.counts.calls += 1
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._in_ours

    def _in_ours(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if event == "opcode":
            self.counts.instructions += 1
        return self._in_ours


async def _append_all(client: TeacherClient, table: Table, append_tokens: int) -> list[float]:
    """Grows one session; the peak of traced memory of each append, where memory is traced."""
    load = Load(k=K, append_tokens=append_tokens)
    session = client.open(PROMPT, load.options(), POLICY)
    peaks = []
    for span in load.spans(table):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        await session.append(span)
        peaks.append(float(tracemalloc.get_traced_memory()[1] - before))
    await session.close()
    return peaks


async def _counted(client: TeacherClient, append_tokens: int) -> tuple[float, float]:
    """Instructions and calls an append: those of APPENDS more appends, so opening is not in."""
    found = []
    for appends in (APPENDS, 2 * APPENDS):
        table = made_table(append_tokens * appends, K)
        await _append_all(client, table, append_tokens)
        tracer = _Tracer()
        sys.settrace(tracer)
        try:
            await _append_all(client, table, append_tokens)
        finally:
            sys.settrace(None)
        found.append(tracer.counts)
    few, many = found
    return (
        (many.instructions - few.instructions) / APPENDS,
        (many.calls - few.calls) / APPENDS,
    )


async def _peak(client: TeacherClient, append_tokens: int) -> float:
    table = made_table(append_tokens * APPENDS, K)
    await _append_all(client, table, append_tokens)
    gc.collect()
    tracemalloc.start()
    try:
        peaks = await _append_all(client, table, append_tokens)
    finally:
        tracemalloc.stop()
    return min(peaks)  # on a busy machine answers overlap with what is left of the ones before


async def _counts() -> tuple[float, float, float, float]:
    engine = StoredEngine({K: made_table(2 * APPENDS * LONG, K)})
    async with local_teacher(engine, info=teacher_info(engine)) as teacher:
        client = await connect(teacher.address)
        instructions, calls = await _counted(client, SHORT)
        more_instructions, _ = await _counted(client, LONG)
        peak, more_peak = await _peak(client, SHORT), await _peak(client, LONG)
        await client.aclose()
    tokens = LONG - SHORT
    return (
        instructions,
        calls,
        (more_instructions - instructions) / tokens,
        (more_peak - peak) / tokens,
    )


def append_path(span: TokenSpan, table: Table, info: TeacherInfo) -> Scores:
    """All that happens to an append between the two ends of the wire, but waiting."""
    request = pb.SessionRequest()
    codec.write_span(request.append.span, span)
    arrived = pb.SessionRequest.FromString(request.SerializeToString())
    received = codec.decode_span(arrived.append.span)
    options = Load(k=K).options()
    check_span(info, options, POLICY, received)
    query = ScoreQuery(
        token_ids=np.concatenate([PROMPT, received.token_ids]),
        first_row=len(PROMPT),
        candidate_ids=received.candidate_ids,
        k=K,
        temperature=1.0,
    )
    check_rows(table.rows, query)
    scores = Scores(
        rows=judged_rows(table.rows, received, POLICY),
        drift=DriftState(num_tokens=len(span)),
        verdict=Verdict.CONTINUE,
        keep_tokens=None,
        timing=Timing(queue_us=1, engine_us=1),
    )
    replies = [
        pb.SessionResponse.FromString(reply.SerializeToString())
        for reply in codec.encode_scores(scores, options.logprob_dtype, "0" * 32)
    ]
    return codec.decode_scores([reply.scores for reply in replies])


def reference(table: Table) -> None:
    """A fixed piece of work of the same kind: small arrays, sorts, copies, a message."""
    for _ in range(12):
        keys = np.concatenate([table.candidate_ids, table.rows.topk_ids], axis=1)
        keys.sort(axis=1)
        (keys[:, 1:] == keys[:, :-1]).sum(axis=1)
        np.isfinite(table.rows.topk_logprobs).all()
        raw = pb.TokenSpan(token_ids=keys.tobytes(), offset=1).SerializeToString()
        np.frombuffer(pb.TokenSpan.FromString(raw).token_ids, np.int32).reshape(keys.shape)


def cpu_over_reference(*, rounds: int = 400) -> float:
    """The two take turns, and the quickest turn of each counts: what disturbs only adds."""
    table = made_table(SHORT, K)
    span, info = Load(k=K).spans(table)[0], teacher_info(StoredEngine({K: table}))
    best = [float("inf"), float("inf")]
    turns = (lambda: append_path(span, table, info), lambda: reference(table))
    for _ in range(rounds):
        for index, work in enumerate(turns):
            started = time.thread_time()
            work()
            best[index] = min(best[index], time.thread_time() - started)
    return best[0] / best[1]


def measured(*, rounds: int = 400) -> Overhead:
    """Takes some seconds; `rounds` of what is timed."""
    instructions, calls, per_token, peak = asyncio.run(_counts())
    return Overhead(
        instructions_per_append=round(instructions, 1),
        calls_per_append=round(calls, 1),
        instructions_per_token=round(per_token, 4),
        peak_bytes_per_token=round(peak, 1),
        cpu_over_reference=round(cpu_over_reference(rounds=rounds), 3),
    )


def recorded() -> dict[str, float] | None:
    """What is on record for this version of Python."""
    found: dict[str, dict[str, float]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found.get(PYTHON)


def main() -> None:
    now = asdict(measured())
    if "--json" in sys.argv[1:]:
        sys.stdout.write(json.dumps(now))
        return
    on_record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    for name, value in now.items():
        before = on_record.get(PYTHON, {}).get(name)
        sys.stdout.write(f"{name:26} {value:10.3f}   on record: {before}\n")
    if "--record" in sys.argv[1:]:
        on_record[PYTHON] = now
        RECORD.write_text(json.dumps(on_record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
