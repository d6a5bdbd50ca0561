"""Do many sessions that grow at once get the engine's throughput, each in fair time?

python -m benchmarks.concurrency --json PATH        1 to 256 sessions, 1 to 4 trainer processes
python -m benchmarks.concurrency --quick            1 and 8 sessions, 1 and 2 trainers
python -m benchmarks.concurrency --sessions 64 --trainers 1 4

One teacher server; trainer processes are started once and told to go together. Every session grows
from its own prompt to its end in pieces, the next piece sent when the rows of the one before are
there: all do the same work. What that costs beyond the engine shows against scoring as many whole
sequences of the same length after the fact (`oneshot_b64`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict

import numpy as np
from rich.console import Console

from benchmarks import options
from benchmarks.arms.base import Job, Setup
from benchmarks.arms.driftline import Driftline
from benchmarks.arms.lineup import started
from benchmarks.measuring import (
    Measured,
    Run,
    Sample,
    interleave,
    ratio_table,
    table,
    wide_console,
    write,
)
from benchmarks.models import SHAPES
from benchmarks.processes import Answering, run
from benchmarks.progress import Progress
from benchmarks.trainer_load import Append

SESSIONS, QUICK_SESSIONS = [1, 8, 64, 256], [1, 8]
TRAINERS, QUICK_TRAINERS = [1, 2, 4], [1, 2]
BATCH, QUICK_BATCH = 64, 8
"""Whole sequences at once, to compare throughput with."""
PROMPT, RESPONSE, PIECE = 64, 256, 64
MANY_SESSIONS, RESPONSE_OF_MANY = 128, 128
"""From that many on responses are shorter, so that the KV cache holds all of them."""
GO_AFTER_S = 0.5
FIGURES = {
    "rows_per_s": ",.0f",
    "append_p50_s": ".3f",
    "append_p95_s": ".3f",
    "engine_s": ".3f",
    "jain_index": ".3f",
}
DESCRIPTION = "sessions that grow over gRPC with a drift policy and the student's top-k, f16"


async def main(arguments: argparse.Namespace, console: Console) -> int:
    quick = arguments.quick
    sessions = arguments.sessions or (QUICK_SESSIONS if quick else SESSIONS)
    trainers = arguments.trainers or (QUICK_TRAINERS if quick else TRAINERS)
    batch = arguments.batch or (QUICK_BATCH if quick else BATCH)
    cells = {
        f"s{s}_t{t}": (_job(arguments, s), t) for s in sessions for t in trainers if s % t == 0
    }
    whole = Job(
        seed=0, prompt=PROMPT, response=arguments.response, piece=arguments.response, texts=batch
    )
    cells[f"oneshot_b{batch}"] = (whole, 1)
    common = options.setup(
        arguments,
        max_context=PROMPT + arguments.response + 64,
        kv_cache_gib=_kv_cache_gib(arguments, [job for job, _ in cells.values()]),
    )
    found = {cell: Measured(description=DESCRIPTION) for cell in cells}
    found[f"oneshot_b{batch}"].description = "whole sequences through the Score call, all at once"
    settings = options.settings(arguments, common)
    settings |= {"jobs": {cell: asdict(job) | {"trainers": t} for cell, (job, t) in cells.items()}}
    progress = Progress(arguments.json, settings)
    progress.restore(found)
    await _measure(
        cells,
        found,
        common,
        repeats=options.repeats(arguments),
        said=options.sayer(console),
        kept=lambda: progress.keep(found),
    )
    ratios = named_ratios(found, batch)
    write(arguments.json, found, ratios, settings)
    progress.done()
    title = f"s sessions from t trainers, {arguments.model}"
    console.print(table(title, found, reference=None, figures=FIGURES))
    console.print(ratio_table(ratios))
    console.print(str(arguments.json), highlight=False)
    return 0


async def _measure(
    cells: Mapping[str, tuple[Job, int]],
    found: dict[str, Measured],
    common: Setup,
    *,
    repeats: int,
    said: Callable[[str], None],
    kept: Callable[[], None],
) -> None:
    server = Driftline(common)
    async with started({"driftline": server}, said) as errors, AsyncExitStack() as stack:
        if errors:
            for measured in found.values():
                measured.error = errors["driftline"]
            return
        loads: list[Answering] = []
        for index in range(max(trainers for _, trainers in cells.values())):
            load = Answering()
            stack.push_async_callback(load.close)
            await load.start(f"trainer-{index}", _command(server.address, index, common))
            loads.append(load)
        calls = {cell: _runs(loads[:t], cell, job) for cell, (job, t) in cells.items()}
        await interleave(calls, found, repeats=repeats, said=said, kept=kept)


def _command(address: str, index: int, common: Setup) -> list[str]:
    arguments = [address, f"trainer-{index}", str(common.vocab_size), str(common.k)]
    return [sys.executable, "-m", "benchmarks.trainer_load", *arguments]


def _job(arguments: argparse.Namespace, sessions: int) -> Job:
    response = arguments.response
    if sessions >= MANY_SESSIONS:
        response = min(response, RESPONSE_OF_MANY)
    return Job(seed=0, prompt=PROMPT, response=response, piece=arguments.piece, texts=sessions)


def _kv_cache_gib(arguments: argparse.Namespace, jobs: Sequence[Job]) -> float:
    """Room for the largest job and a tenth more."""
    shape = SHAPES[arguments.model]
    value_bytes = 4 if arguments.dtype == "float32" else 2
    token_bytes = 2 * value_bytes * shape.layers * shape.kv_heads * shape.head_dim
    tokens = max(job.texts * (job.prompt + job.response) for job in jobs)
    return round(max(1.0, 1.1 * tokens * token_bytes / 2**30), 2)


def _runs(loads: Sequence[Answering], cell: str, job: Job) -> Run:
    """Each trainer has its share of the sessions. To warm up, one piece of each does."""

    async def once(repeat: int) -> Sample:
        start_at = time.monotonic() + GO_AFTER_S
        questions = []
        for index in range(len(loads)):
            share = asdict(job)
            if repeat < 0:
                share["response"] = share["piece"] = PIECE
            share["texts"] = job.texts // len(loads)
            share["seed"] = zlib.crc32(f"{cell} {repeat} {index}".encode())
            questions.append({"job": share, "start_at": start_at})
        answers = await asyncio.gather(
            *(load.ask(question) for load, question in zip(loads, questions, strict=True))
        )
        made = [[Append(*values) for values in answer["appends"]] for answer in answers]
        return sample(made, start_at)

    return once


def sample(trainers: Sequence[Sequence[Append]], started_at: float) -> Sample:
    """What the appends of some trainers that went together come to."""
    every = [append for made in trainers for append in made]
    seconds = max(append.answered for append in every) - started_at
    latencies = [append.answered - append.sent for append in every]
    return Sample(
        seconds=seconds,
        figures={
            "rows_per_s": sum(append.rows for append in every) / seconds,
            "append_p50_s": float(np.percentile(latencies, 50)),
            "append_p95_s": float(np.percentile(latencies, 95)),
            "engine_s": float(np.median([append.engine_s for append in every])),
            "queue_s": float(np.median([append.queue_s for append in every])),
            "jain_index": jain_index(shares(trainers)),
        },
    )


def shares(trainers: Sequence[Sequence[Append]]) -> list[float]:
    """Rows of each trainer while all of them were at work: until the first of them had ended.

    An append on its way at that moment counts for the part of its time that had passed: sessions go
    in waves, and the end of a wave reaches one trainer a moment before another.
    """
    until = min(max(append.answered for append in made) for made in trainers)

    def done(append: Append) -> float:
        part = (until - append.sent) / max(append.answered - append.sent, 1e-9)
        return append.rows * min(max(part, 0.0), 1.0)

    return [sum(done(append) for append in made) for made in trainers]


def jain_index(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 for equal shares, 1/n when one has all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def named_ratios(found: Mapping[str, Measured], batch: int) -> dict[str, float | None]:
    """Throughput over the one-shot's, p95 of an append over the engine's time for one, fairness."""
    ratios: dict[str, float | None] = {}
    whole = found[f"oneshot_b{batch}"].figure("rows_per_s")
    for cell, measured in found.items():
        if cell.startswith("oneshot"):
            continue
        figure = measured.figure
        ratios[f"throughput_{cell}_over_oneshot_b{batch}"] = _over(figure("rows_per_s"), whole)
        ratios[f"append_p95_over_engine_{cell}"] = _over(figure("append_p95_s"), figure("engine_s"))
        if not cell.endswith("_t1"):
            ratios[f"jain_index_{cell}"] = figure("jain_index")
    return ratios


def _over(upper: float | None, lower: float | None) -> float | None:
    return None if upper is None or not lower else round(upper / lower, 4)


def parser() -> argparse.ArgumentParser:
    flags = options.parser("concurrency", __doc__ or "")
    flags.add_argument("--sessions", type=int, nargs="+", help="growing at once")
    flags.add_argument("--trainers", type=int, nargs="+", help="processes they come from")
    flags.add_argument("--batch", type=int, help="of the one-shot throughput")
    flags.add_argument("--response", type=int, default=RESPONSE, help="tokens of a session")
    flags.add_argument("--piece", type=int, default=PIECE, help="tokens of an append")
    return flags


if __name__ == "__main__":
    sys.exit(run(main(parser().parse_args(), wide_console())))
