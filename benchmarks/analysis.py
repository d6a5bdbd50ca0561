"""What does looking cost: an analysis beside a Score of the same tokens, and a trainer beside one
who analyses without a pause?

    python -m benchmarks.analysis --json PATH
    python -m benchmarks.analysis --quick        the playground's teacher alone, few repeats

The transformers engine in float32, the same K and candidates in every arm; arms are in turns. Both
teachers run as `teacher-server serve`; trainer and reader are processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks.analysis_reader import body_of, one_text
from benchmarks.arms.base import Job
from benchmarks.arms.driftline import span
from benchmarks.measuring import (
    Measured,
    Run,
    Sample,
    interleave,
    ratio,
    ratio_table,
    table,
    wide_console,
    write,
)
from benchmarks.models import SHAPES, checkpoint
from benchmarks.processes import LOGS, Answering, child, ready_file, run
from benchmarks.progress import Progress
from benchmarks.provenance import ROOT
from teacher_client.client import TeacherClient
from teacher_wire.records import ScoreOptions

PLAYGROUND = ROOT / "examples" / "playground" / "checkpoints" / "teacher"
LARGE = "qwen3-0.6b"
FORMS = {
    "analyze": "application/json",
    "analyze_lines": "application/x-ndjson",
    "analyze_arrow": "application/vnd.apache.arrow.stream",
}
READERS = {"alone": "", "beside_analyze": "/v1/analyze", "beside_score": "/v1/score"}
TOKENS, PLAYGROUND_TOKENS = 1000, 960
"""The playground's context is 1,024."""
TRAINER = Job(seed=1, prompt=16, response=512, piece=64, texts=32)
TRAINER_K = "16"
"""Its drift policy compares as many."""
REPEATS, SIDE_REPEATS, QUICK_REPEATS = 3, 7, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A running teacher."""

    grpc_address: str
    http_address: str
    vocab_size: int
    k: int
    pid: int

    def cpu_s(self) -> float:
        """Processor time of all its threads (Linux: the process's own clock, read from here)."""
        return time.clock_gettime((~self.pid << 3) | 2)


@asynccontextmanager
async def served(name: str, model: Path, vocab_size: int, k: int) -> AsyncIterator[Served]:
    """The transformers engine on this model, in float32."""
    ready = ready_file()
    flags = {"engine": "hf", "model": model, "dtype": "float32", "device": "cpu", "max-k": 32}
    flags |= {"max-context": 1024 if model == PLAYGROUND else 2048, "ready-file": ready}
    flags |= {"grpc-port": 0, "http-port": 0, "log-level": "warning"}
    flags |= {"engine-stall-s": 900, "engine-lost-s": 1800}  # a busy machine is not a lost engine
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    command = [sys.executable, "-m", "teacher_server.cli", "serve", *words]
    with child(f"analysis-{name}", command) as server:
        await server.until(ready.exists)
        told = json.loads(ready.read_text())
        ready.unlink()
        yield Served(
            grpc_address=told["grpc_address"],
            http_address=told["http_address"],
            vocab_size=vocab_size,
            k=k,
            pid=told["pid"],
        )


@asynccontextmanager
async def cost_runs(teacher: Served, tokens: int) -> AsyncIterator[dict[str, Run]]:
    """One Score over gRPC, and one analysis in each form, of the same tokens."""
    text = one_text(tokens, vocab_size=teacher.vocab_size, k=teacher.k)
    content = json.dumps(body_of(text, "/v1/analyze", teacher.k))
    options = ScoreOptions(k=teacher.k)
    client = await TeacherClient.connect(
        [teacher.grpc_address],
        tokenizer_fingerprint="",
        vocab_size=teacher.vocab_size,
        run_id="score",
    )
    http = httpx.AsyncClient(base_url=f"http://{teacher.http_address}", timeout=1800.0)

    async def score(repeat: int) -> Sample:
        began, cpu_s = time.monotonic(), teacher.cpu_s()
        scores = await client.score(text.prompt_ids, span(text, 0, tokens), options, None)
        seconds = time.monotonic() - began
        rows = scores.rows
        sent = [rows.topk_ids, rows.topk_logprobs, rows.token_logprobs, rows.candidate_logprobs]
        num_bytes = sum(array.nbytes for array in sent if array is not None)
        return sample(seconds, cpu_s, num_bytes)

    def sample(seconds: float, cpu_s: float, num_bytes: int) -> Sample:
        figures = {"cpu_s": teacher.cpu_s() - cpu_s, "bytes_per_token": num_bytes / tokens}
        return Sample(seconds=seconds, figures=figures)

    def analyze(form: str) -> Run:
        headers = {"content-type": "application/json", "accept": form}

        async def once(repeat: int) -> Sample:
            began, cpu_s = time.monotonic(), teacher.cpu_s()
            reply = await http.post("/v1/analyze", content=content, headers=headers)
            reply.raise_for_status()
            return sample(time.monotonic() - began, cpu_s, len(reply.content))

        return once

    try:
        yield {"score": score, **{name: analyze(form) for name, form in FORMS.items()}}
    finally:
        await client.aclose()
        await http.aclose()


@asynccontextmanager
async def side_runs(teacher: Served, tokens: int) -> AsyncIterator[dict[str, Run]]:
    """A trainer's appends, alone and beside one who asks without a pause."""
    trainer, reader = Answering(), Answering()
    python, size = [sys.executable, "-m"], str(teacher.vocab_size)
    words = ["benchmarks.trainer_load", teacher.grpc_address, "trainer", size, TRAINER_K]
    await trainer.start("analysis-trainer", [*python, *words])
    words = ["benchmarks.analysis_reader", teacher.http_address, size, str(teacher.k)]
    await reader.start("analysis-reader", [*python, *words])
    done = LOGS / "analysis-done"

    def beside(path: str) -> Run:
        async def once(repeat: int) -> Sample:
            done.unlink(missing_ok=True)
            question = {"path": path, "tokens": tokens, "until": str(done)}
            reading = asyncio.create_task(reader.ask(question)) if path else None
            await asyncio.sleep(0.5)
            start = {"job": asdict(TRAINER), "start_at": time.monotonic() + 0.2}
            answer = await trainer.ask(start)
            done.touch()
            answered = [] if reading is None else (await reading)["answered"]
            appends = answer["appends"]
            began, ended = min(a[0] for a in appends), max(a[1] for a in appends)
            rows = sum(a[-1] for a in appends)
            read = sum(began < at <= ended for at in answered) * tokens
            figures = {"rows_per_s": rows / (ended - began), "read_share": read / (rows + read)}
            return Sample(seconds=ended - began, figures=figures)

        return once

    try:
        yield {name: beside(path) for name, path in READERS.items()}
    finally:
        await trainer.close()
        await reader.close()


def named_ratios(arms: Mapping[str, Measured]) -> dict[str, float | None]:
    """Each form over Score on each teacher, and what each reader leaves of the trainer's speed."""
    found: dict[str, float | None] = {}
    for teacher in ("playground", LARGE):
        for form in FORMS:
            if f"{teacher}_{form}" in arms:
                name = f"{form}_over_score_{teacher}"
                found[name] = ratio(arms, f"{teacher}_{form}", f"{teacher}_score")
                ours, other = (arms[f"{teacher}_{arm}"].figure("cpu_s") for arm in (form, "score"))
                found[f"{name}_cpu"] = ours / other if ours and other else None
    for name in ("beside_analyze", "beside_score"):
        found[f"trainer_speed_{name}"] = ratio(arms, "trainer_alone", f"trainer_{name}")
    return found


async def main(arguments: argparse.Namespace, console: Console) -> int:
    quick, k = arguments.quick, arguments.k
    repeats = arguments.repeats or (QUICK_REPEATS if quick else REPEATS)
    side = arguments.repeats or (QUICK_REPEATS if quick else SIDE_REPEATS)
    settings = {"k": k, "tokens": {"playground": PLAYGROUND_TOKENS, LARGE: TOKENS}}
    settings |= {"dtype": "float32", "trainer": asdict(TRAINER), "repeats": repeats, "side": side}
    arms: dict[str, Measured] = {}
    progress = Progress(arguments.json, settings)

    async def measure(prefix: str, runs: Mapping[str, Run], times: int) -> None:
        made = {f"{prefix}_{name}": Measured(description=name) for name in runs}
        arms.update(made)
        progress.restore(made)
        await interleave(
            {f"{prefix}_{name}": one for name, one in runs.items()},
            made,
            repeats=times,
            pause_s=0.5,
            said=lambda line: console.print(line, highlight=False),
            kept=lambda: progress.keep(arms),
        )

    async with served("playground", PLAYGROUND, 64, k) as teacher:
        async with cost_runs(teacher, PLAYGROUND_TOKENS) as runs:
            await measure("playground", runs, side)
        async with side_runs(teacher, PLAYGROUND_TOKENS) as runs:
            await measure("trainer", runs, side)
    if not quick:
        async with served(LARGE, checkpoint(LARGE), SHAPES[LARGE].vocab, k) as teacher:
            async with cost_runs(teacher, TOKENS) as runs:
                chosen = {name: runs[name] for name in ("score", "analyze")}
                await measure(LARGE, chosen, repeats)
    found = named_ratios(arms)
    write(arguments.json, arms, found, settings)
    progress.done()
    figures = {"cpu_s": ".3f", "bytes_per_token": ",.0f", "rows_per_s": ",.0f", "read_share": ".2f"}
    console.print(table("analysis", arms, reference=None, figures=figures))
    console.print(ratio_table(found))
    return 1 if any(arm.error for arm in arms.values()) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default: Any = ROOT / "runs" / "bench-analysis.json"
    made.add_argument("--quick", action="store_true", help="the playground's teacher alone")
    made.add_argument("--json", type=Path, default=default, metavar="PATH", help="results")
    made.add_argument("--k", type=int, default=10, help="top-k and candidates a row (10)")
    made.add_argument("--repeats", type=int, help="of each arm")
    return made


if __name__ == "__main__":
    sys.exit(run(main(parser().parse_args(), wide_console())))
