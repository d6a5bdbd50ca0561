"""Bytes and CPU time a token on the way from an engine's rows to a learner's arrays. No model.

python -m benchmarks.wire --json PATH       K = 16, 32, 64, 128
python -m benchmarks.wire --quick           K = 32 alone, two repeats

Ours is the whole service over gRPC with stored rows for an engine, checks, overlap, drift and
verdicts included; sessions grow by 64 tokens unless an arm says otherwise. The others are replicas
of wire shapes behind a bare HTTP server that send a whole response in one reply, which spares them
the cost of many replies.
CPU time is that of both processes, all threads.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.measuring import (
    Measured,
    Run,
    Sample,
    interleave,
    ratio,
    ratio_table,
    wide_console,
    write,
)
from benchmarks.service_load import POLICY, PROMPT, Load, connect, grow
from benchmarks.stored_rows import Table, made_table, rows_of
from benchmarks.teacher_process import ServerProcess, server_process
from benchmarks.wire_shapes import SHAPES, Shape
from teacher_client.client import TeacherClient
from teacher_server.scoring.judging import judged_rows
from teacher_wire import codec
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import LogprobDtype, Scores, Timing, TokenSpan, Verdict

PAPER_KS = (16, 32, 64, 128)
TOKENS = 512
RESPONSES = 16
"""Scored in one repeat."""
TARGETS = {"cpu_us_per_token": 15.0, "f16_bytes_per_token": 200.0}
"""At K = 32 with appends of 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """One way to use the service."""

    name: str
    description: str
    dtype: LogprobDtype
    candidates: bool = False
    append_tokens: int = 64

    def load(self, k: int) -> Load:
        """At this K."""
        return Load(
            k=k, dtype=self.dtype, candidates=self.candidates, append_tokens=self.append_tokens
        )


OURS = (
    Ours(
        name="driftline_whole_f32",
        description="driftline over gRPC: top-k, float32, a whole response in one append",
        dtype=LogprobDtype.F32,
        append_tokens=TOKENS,
    ),
    Ours(
        name="driftline_f32",
        description="driftline over gRPC: top-k, float32",
        dtype=LogprobDtype.F32,
    ),
    Ours(
        name="driftline_f16",
        description="driftline over gRPC: top-k, float16",
        dtype=LogprobDtype.F16,
    ),
    Ours(
        name="driftline_verdict_f32",
        description="driftline over gRPC: top-k, candidates, overlap, verdict, float32",
        dtype=LogprobDtype.F32,
        candidates=True,
    ),
    Ours(
        name="driftline_verdict_f16",
        description="driftline over gRPC: top-k, candidates, overlap, verdict, float16",
        dtype=LogprobDtype.F16,
        candidates=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the arms share."""

    table: Table
    k: int
    client: TeacherClient
    teacher: ServerProcess
    replicas: ServerProcess
    http: httpx.AsyncClient


def per_token(cpu_s: float, num_tokens: int) -> float:
    """Microseconds."""
    return round(cpu_s / num_tokens * 1e6, 4)


def _timed(work: Callable[[], object], num_tokens: int, times: int = 20) -> float:
    work()
    started = time.process_time()
    for _ in range(times):
        work()
    return per_token(time.process_time() - started, num_tokens * times)


def _sample(figures: dict[str, float]) -> Sample:
    """The seconds are CPU seconds of both ends for a thousand tokens."""
    return Sample(seconds=figures["cpu_us_per_token"] / 1e3, figures=figures)


def _figures(
    server_s: float, client_s: float, num_tokens: int, encode_us: float, decode_us: float
) -> dict[str, float]:
    total = per_token(server_s + client_s, num_tokens)
    return {
        "cpu_us_per_token": total,
        "server_us_per_token": per_token(server_s, num_tokens),
        "client_us_per_token": per_token(client_s, num_tokens),
        "encode_us_per_token": encode_us,
        "decode_us_per_token": decode_us,
        "transport_us_per_token": round(total - encode_us - decode_us, 4),
    }


def _replies(load: Load, table: Table) -> tuple[list[Scores], list[TokenSpan]]:
    """The answers to the appends of one response, before they are encoded."""
    spans, answers = load.spans(table), []
    for span in spans:
        judged = judged_rows(rows_of(table, span), span, POLICY if load.candidates else None)
        answers.append(
            Scores(
                rows=judged,
                drift=None,
                verdict=Verdict.CONTINUE,
                keep_tokens=None,
                timing=Timing(queue_us=100, engine_us=20_000),
            )
        )
    return answers, spans


def ours(bench: Bench, load: Load) -> Run:
    """The service, as a trainer uses it."""
    answers, spans = _replies(load, bench.table)
    name, num_tokens = "0" * 32, len(bench.table)

    def encode() -> list[bytes]:
        return [
            reply.SerializeToString()
            for scores in answers
            for reply in codec.encode_scores(scores, load.dtype, name)
        ]

    raw = encode()
    sent = sum(pb.TokenSpan.ByteSize(codec.encode_span(span)) for span in spans)

    def decode() -> None:
        for reply in raw:
            codec.decode_scores([pb.SessionResponse.FromString(reply).scores])

    async def run(_: int) -> Sample:
        encode_us, decode_us = _timed(encode, num_tokens), _timed(decode, num_tokens)
        server_s, client_s = bench.teacher.cpu_s(), time.process_time()
        scored = 0
        while scored < RESPONSES * num_tokens:
            scored += await grow(bench.client, load, bench.table)
        server_s, client_s = bench.teacher.cpu_s() - server_s, time.process_time() - client_s
        figures = _figures(server_s, client_s, scored, encode_us, decode_us)
        figures["bytes_per_token"] = round(sum(map(len, raw)) / num_tokens, 1)
        figures["sent_bytes_per_token"] = round(sent / num_tokens, 1)
        return _sample(figures)

    return run


def replica(bench: Bench, shape: Shape) -> Run:
    """A shape behind HTTP: a whole response in one reply."""
    table = bench.table
    raw, num_tokens = shape.encode(table.rows, table.token_ids), len(table)
    url = f"{bench.replicas.address}/{shape.name}/{bench.k}"

    async def run(_: int) -> Sample:
        encode_us = _timed(lambda: shape.encode(table.rows, table.token_ids), num_tokens, 2)
        decode_us = _timed(lambda: shape.decode(raw), num_tokens, 2)
        server_s, client_s = bench.replicas.cpu_s(), time.process_time()
        for _ in range(RESPONSES):
            response = await bench.http.get(url)
            decoded = shape.decode(response.raise_for_status().content)
            assert decoded.topk_logprobs.shape == table.rows.topk_logprobs.shape
        server_s, client_s = bench.replicas.cpu_s() - server_s, time.process_time() - client_s
        figures = _figures(server_s, client_s, RESPONSES * num_tokens, encode_us, decode_us)
        figures["bytes_per_token"] = round(len(raw) / num_tokens, 1)
        figures["sent_bytes_per_token"] = 0.0
        return _sample(figures)

    return run


async def measure(ks: list[int], repeats: int, console: Console) -> dict[str, Measured]:
    """All arms at every K, as `<arm>_k<K>`."""
    arms: dict[str, Measured] = {}
    words = ["--tokens", str(TOKENS), "--k", *map(str, ks)]
    with (
        server_process("benchmarks.teacher_process", words) as teacher,
        server_process("benchmarks.replica_process", words) as replicas,
    ):
        client = await connect(teacher.address)
        async with httpx.AsyncClient() as http:
            for k in ks:
                bench = Bench(
                    table=made_table(TOKENS, k),
                    k=k,
                    client=client,
                    teacher=teacher,
                    replicas=replicas,
                    http=http,
                )
                runs: dict[str, Run] = {}
                for way in OURS:
                    runs[f"{way.name}_k{k}"] = ours(bench, way.load(k))
                    arms[f"{way.name}_k{k}"] = Measured(description=way.description)
                for shape in SHAPES:
                    runs[f"{shape.name}_k{k}"] = replica(bench, shape)
                    arms[f"{shape.name}_k{k}"] = Measured(description=shape.description)
                await interleave(runs, arms, repeats=repeats, pause_s=0.0)
                console.print(shown(k, arms))
        await client.aclose()
    return arms


COLUMNS = {
    "bytes_per_token": "bytes",
    "encode_us_per_token": "encode us",
    "transport_us_per_token": "transport us",
    "decode_us_per_token": "decode us",
    "cpu_us_per_token": "both ends us",
}


def shown(k: int, arms: dict[str, Measured]) -> RichTable:
    """The arms at one K, a token each."""
    table = RichTable(title=f"a token at K = {k}", title_justify="left", pad_edge=False)
    table.add_column("arm", min_width=max(len(way.name) for way in OURS))
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    table.add_column("")
    for name, arm in arms.items():
        if name.endswith(f"_k{k}"):
            values = [arm.figure(figure) for figure in COLUMNS]
            cells = ["-" if value is None else f"{value:,.2f}" for value in values]
            table.add_row(name.removesuffix(f"_k{k}"), *cells, arm.error or "")
    return table


def ratios(arms: dict[str, Measured], ks: list[int]) -> dict[str, float | None]:
    """Of each replica over ours with top-k alone in float32, and ours over its targets.

    CPU time over both of ours: that of many small replies, and that of one as large as theirs.
    """
    found: dict[str, float | None] = {}
    for k in ks:
        for shape in SHAPES:
            name, under = f"{shape.name}_k{k}", f"driftline_f32_k{k}"
            found[f"{shape.name}_over_driftline_cpu_k{k}"] = ratio(arms, name, under)
            whole = f"driftline_whole_f32_k{k}"
            found[f"{shape.name}_over_driftline_whole_cpu_k{k}"] = ratio(arms, name, whole)
            upper, lower = (arms[arm].figure("bytes_per_token") for arm in (name, under))
            found[f"{shape.name}_over_driftline_bytes_k{k}"] = (
                None if upper is None or not lower else round(upper / lower, 4)
            )
    cpu_us = arms["driftline_verdict_f32_k32"].figure("cpu_us_per_token") if 32 in ks else None
    size = arms["driftline_f16_k32"].figure("bytes_per_token") if 32 in ks else None
    found["driftline_verdict_cpu_over_target_k32"] = (
        None if cpu_us is None else round(cpu_us / TARGETS["cpu_us_per_token"], 4)
    )
    found["driftline_f16_bytes_over_target_k32"] = (
        None if size is None else round(size / TARGETS["f16_bytes_per_token"], 4)
    )
    return found


def main() -> int:
    arguments = _parser().parse_args()
    console = wide_console()
    ks = [32] if arguments.quick else list(PAPER_KS)
    repeats = 2 if arguments.quick else arguments.repeats
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        arms = runner.run(measure(ks, repeats, console))
    found = ratios(arms, ks)
    console.print(ratio_table(found))
    if arguments.json:
        settings: dict[str, Any] = {
            "tokens": TOKENS,
            "responses_per_repeat": RESPONSES,
            "append_tokens": Load(k=32).append_tokens,
            "sessions_at_once": Load(k=32).sessions,
            "prompt_tokens": len(PROMPT),
            "seconds": "CPU seconds of both processes for 1,000 tokens",
            "targets_at_k32": TARGETS,
            "repeats": repeats,
        }
        write(arguments.json, arms, found, settings)
    return 1 if any(arm.error for arm in arms.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wire",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="K = 32, two repeats")
    parser.add_argument("--repeats", type=int, default=5, help="of each arm (default 5)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
