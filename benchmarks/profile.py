"""Where the time of one append goes, by stage. One session, so that nothing waits for another.

python -m benchmarks.profile --json PATH                 stored rows: the service alone
python -m benchmarks.profile --engine vllm --model tiny  a real engine; hf likewise

The server runs in this process with stopwatches at its seams: around the engine, the scheduler and
the session table. What lies between seams is a difference, codec and checks are timed alone on the
same messages, and the engine's forward pass is what it takes to score the last row only. Both ends
run on one thread here, so `wire and loops` is more than in two processes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import uvloop
from rich.table import Table as RichTable

from benchmarks import options
from benchmarks.measuring import Measured, Sample, first_line, wide_console, write
from benchmarks.models import SHAPES, checkpoint
from benchmarks.service_load import POLICY, PROMPT, Load, connect
from benchmarks.stored_rows import VOCAB_SIZE, StoredEngine, Table, made_table, rows_of
from teacher_server.engine.base import ScoreQuery, ScoringEngine, check_finite
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.engine.row_format import POSITION, RowCollector, RowRequest
from teacher_server.scoring.judging import check_rows, judged_rows
from teacher_server.scoring.validation import check_span
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire import codec
from teacher_wire.errors import TeacherError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import Scores, Timing, Verdict

ENGINES = ("stored", "fake", "hf", "vllm")
LAG_INTERVAL_S = 0.002
BLOCK_SIZE = 32


@dataclass(slots=True)
class Stopwatch:
    """Seconds of each append, by seam."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seam: str, started: float) -> None:
        self.seconds.setdefault(seam, []).append(time.perf_counter() - started)

    def around(self, part: object, method: str, seam: str) -> None:
        """Times every call of a part's method, for as long as the part lives."""
        call = getattr(part, method)

        async def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return await call(*args, **kwargs)
            finally:
                self.add(seam, started)

        setattr(part, method, timed)

    def median(self, seam: str) -> float:
        return median(self.seconds[seam]) if seam in self.seconds else 0.0


@asynccontextmanager
async def timed_teacher(engine: ScoringEngine, watch: Stopwatch) -> AsyncIterator[str]:
    """The address of a server in this process, with stopwatches between its parts."""
    async with local_teacher(engine) as teacher:
        watch.around(teacher.engine, "score", "engine")
        watch.around(teacher.scheduler, "score", "scheduler")
        watch.around(teacher.sessions, "append", "sessions")
        yield teacher.address


def built(arguments: argparse.Namespace, table: Table, load: Load) -> ScoringEngine:
    """The engine to look into."""
    if arguments.engine == "stored":
        return StoredEngine({load.k: table})
    if arguments.engine == "fake":
        return FakeEngine(vocab_size=VOCAB_SIZE, max_context=1 << 20)
    model, dtype = str(checkpoint(arguments.model)), arguments.dtype
    max_context = len(PROMPT) + len(table) + 1
    if arguments.engine == "hf":
        from teacher_server.engine.hf_engine import HfEngine

        return HfEngine(model=model, dtype=dtype, max_context=max_context)
    from teacher_server.engine.vllm_engine import VllmEngine

    return VllmEngine(
        model=model,
        dtype=dtype,
        max_context=max_context,
        block_size=BLOCK_SIZE,
        kv_cache_gib=1.0,
        enforce_eager=True,
        cpu_cores=arguments.cores or options.all_cores(),
    )


async def appends(address: str, load: Load, table: Table, watch: Stopwatch) -> None:
    """One response, append by append."""
    client = await connect(address)
    session = client.open(PROMPT, load.options(), POLICY)
    for span in load.spans(table):
        started = time.perf_counter()
        await session.append(span)
        watch.add("client", started)
    await session.close()
    await client.aclose()


async def loop_lag(watch: Stopwatch) -> None:
    """How late this loop wakes a sleeper."""
    while True:
        started = time.perf_counter()
        await asyncio.sleep(LAG_INTERVAL_S)
        watch.add("lag", started + LAG_INTERVAL_S)


async def last_rows(engine: ScoringEngine, load: Load, table: Table, watch: Stopwatch) -> None:
    """The same growth with one row an append: a forward pass and next to nothing of the head."""
    ids = np.concatenate([PROMPT, table.token_ids[::-1]])
    for stop in range(len(PROMPT) + load.append_tokens, len(ids) + 1, load.append_tokens):
        query = ScoreQuery(
            token_ids=ids[:stop],
            first_row=stop - 1,
            candidate_ids=table.candidate_ids[:1],
            k=load.k,
            temperature=1.0,
            session="last-rows",
        )
        started = time.perf_counter()
        await engine.score(query)
        watch.add("forward", started)
    engine.forget("last-rows")


def _alone(work: Callable[[], object], times: int = 50) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def pieces(load: Load, table: Table) -> dict[str, float]:
    """Seconds of what needs no loop: codec, checks, judgement, an engine's copies."""
    span = load.spans(table)[0]
    rows = rows_of(table, span)
    info, options = teacher_info(StoredEngine({load.k: table})), load.options()
    query = ScoreQuery(
        token_ids=np.concatenate([PROMPT, span.token_ids]),
        first_row=len(PROMPT),
        candidate_ids=span.candidate_ids,
        k=load.k,
        temperature=1.0,
    )
    request = pb.SessionRequest()
    codec.write_span(request.append.span, span)
    asked = request.SerializeToString()
    scores = Scores(
        rows=judged_rows(rows, span, POLICY),
        drift=None,
        verdict=Verdict.CONTINUE,
        keep_tokens=None,
        timing=Timing(),
    )
    (reply,) = codec.encode_scores(scores, load.dtype, "0" * 32)
    answered = reply.SerializeToString()
    return {
        "client encode": _alone(lambda: codec.encode_span(span).SerializeToString()),
        "decode": _alone(
            lambda: codec.decode_span(pb.SessionRequest.FromString(asked).append.span)
        ),
        "checks": _alone(
            lambda: (check_span(info, options, POLICY, span), check_rows(rows, query))
        ),
        "overlap and drift": _alone(lambda: judged_rows(rows, span, POLICY)),
        "copy": _alone(_copies(RowRequest.of_query(query, BLOCK_SIZE))),
        "encode": _alone(
            lambda: [r.SerializeToString() for r in codec.encode_scores(scores, load.dtype, "0")]
        ),
        "client decode": _alone(
            lambda: codec.decode_scores([pb.SessionResponse.FromString(answered).scores])
        ),
    }


def _copies(request: RowRequest) -> Callable[[], None]:
    """What happens to a packed answer in front of an engine."""
    num_rows = len(request.target_ids)
    packed = np.zeros((num_rows, request.width()), np.int32)
    packed[:, POSITION] = np.arange(request.first_row, request.first_row + num_rows)

    def copies() -> None:
        collector = RowCollector(request)
        collector.add(packed, num_rows)
        check_finite(collector.rows(), request.first_row)

    return copies


def stages(watch: Stopwatch, alone: dict[str, float], *, model: bool) -> dict[str, float]:
    """Seconds an append, in order; they add up to what the client waits."""
    engine, forward = watch.median("engine"), min(watch.median("forward"), watch.median("engine"))
    copy = min(alone["copy"], engine - forward) if model else 0.0
    judging = alone["checks"] + alone["overlap and drift"]
    codec_s = sum(alone[name] for name in ("client encode", "decode", "encode", "client decode"))
    found = {
        "client encode": alone["client encode"],
        "decode": alone["decode"],
        "admission: checks": alone["checks"],
        "admission: overlap and drift": alone["overlap and drift"],
        "admission: session": watch.median("sessions") - watch.median("scheduler") - judging,
        "engine queue": watch.median("scheduler") - engine,
        "engine: forward" if model else "engine": forward if model else engine,
    }
    if model:
        found |= {"engine: head and rows": engine - forward - copy, "engine: copy": copy}
    found |= {
        "encode": alone["encode"],
        "client decode": alone["client decode"],
        "wire and loops": watch.median("client") - watch.median("sessions") - codec_s,
    }
    return found


async def measure(arguments: argparse.Namespace) -> tuple[dict[str, Measured], Stopwatch]:
    """An arm a stage; its seconds are those of one append, in each repeat."""
    load = Load(k=arguments.k, append_tokens=arguments.append_tokens)
    is_model = arguments.engine in ("hf", "vllm")
    vocab_size = SHAPES[arguments.model].vocab if is_model else VOCAB_SIZE
    table = made_table(arguments.tokens, load.k, vocab_size=vocab_size)
    engine = built(arguments, table, load)
    await engine.start()
    arms: dict[str, Measured] = {}
    lags = Stopwatch()
    try:
        for repeat in range(-1, 2 if arguments.quick else arguments.repeats):
            watch = Stopwatch()
            if is_model:  # a text that was scored before would be in the engine's prefix cache
                table = made_table(arguments.tokens, load.k, vocab_size=vocab_size, seed=repeat + 2)
            async with timed_teacher(engine, watch) as address:
                lagging = asyncio.create_task(loop_lag(watch))
                await appends(address, load, table, watch)
                lagging.cancel()
            if is_model:
                await last_rows(engine, load, table, watch)
            if repeat < 0:
                continue
            for name, seconds in stages(watch, pieces(load, table), model=is_model).items():
                arms.setdefault(name, Measured()).samples.append(Sample(seconds=seconds))
            lags.seconds.setdefault("lag", []).extend(watch.seconds.get("lag", [0.0]))
    finally:
        await engine.close()
    return arms, lags


def shown(arms: dict[str, Measured], lags: Stopwatch, append_tokens: int) -> RichTable:
    """Medians and shares."""
    table = RichTable(title="one append, by stage", title_justify="left", pad_edge=False)
    table.add_column("stage")
    for title in ("us an append", "us a token", "share"):
        table.add_column(title, justify="right")
    total = sum(arm.median_s or 0.0 for arm in arms.values()) or 1.0
    for name, arm in arms.items():
        seconds = arm.median_s or 0.0
        table.add_row(
            name,
            f"{seconds * 1e6:,.0f}",
            f"{seconds * 1e6 / append_tokens:,.2f}",
            arm.error or f"{seconds / total:.1%}",
        )
    if not lags.seconds:
        return table
    table.add_row("what the client waits", f"{total * 1e6:,.0f}", "", "", end_section=True)
    table.add_row("loop lag, median", f"{lags.median('lag') * 1e6:,.0f}", "", "")
    table.add_row("loop lag, p95", f"{quantiles(lags.seconds['lag'], n=20)[-1] * 1e6:,.0f}", "", "")
    return table


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=ENGINES, default="stored")
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b", help="shape, for hf, vllm")
    parser.add_argument("--dtype", default="auto", help="of the model, for hf, vllm")
    parser.add_argument("--cores", help='for vllm: such as 0,1, or "auto" (default: all of a CPU)')
    parser.add_argument("--tokens", type=int, default=1024, help="of the response")
    parser.add_argument("--append-tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="two repeats")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser


def main() -> int:
    arguments = arguments_parser().parse_args()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            arms, lags = runner.run(measure(arguments))
    except (TeacherError, ImportError, OSError) as error:
        arms, lags = {"engine": Measured(error=first_line(error))}, Stopwatch()
    wide_console().print(shown(arms, lags, arguments.append_tokens))
    if arguments.json:
        total = sum(arm.median_s or 0.0 for arm in arms.values()) or 1.0
        shares = {
            f"{name}_over_append": round((arm.median_s or 0.0) / total, 4)
            for name, arm in arms.items()
        }
        names = ("engine", "model", "dtype", "tokens", "append_tokens", "k")
        settings = {name: getattr(arguments, name) for name in names}
        write(arguments.json, arms, shares, settings | {"cores": arguments.cores or "all"})
    return 1 if any(arm.error for arm in arms.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
