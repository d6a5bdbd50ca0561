"""Peak resident memory: of scoring, by length and vocabulary, and of sessions that lie idle.

python -m benchmarks.memory --json PATH
python -m benchmarks.memory --quick            short sequences, 200 sessions, one repeat

rows      the language-model head and the rows of a whole prefill, above what is held before
hf        the transformers engine with every row, above its own peak with the last row alone
sessions  a server with stored rows, before and after it has scored this many responses

Every measurement of the first two is a process of its own. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.measuring import Measured, Run, Sample, interleave, ratio_table, wide_console, write
from benchmarks.memory_child import status_bytes
from benchmarks.progress import Progress
from benchmarks.provenance import ROOT
from benchmarks.service_load import POLICY, PROMPT, Load, connect
from benchmarks.stored_rows import Table, made_table
from benchmarks.teacher_process import server_process
from teacher_client.client import TeacherClient, TeacherSession

MIB = 2**20
VOCABULARIES = (32_768, 151_936)
LENGTHS = {"rows": (512, 2048, 8192), "hf": (512, 2048)}
SESSIONS, SESSION_TOKENS = (100, 500, 2000), 1024
AT_ONCE = 16
LIMITS = {"extra_mib_of_scoring": 512.0, "kib_per_idle_session": 100.0}


def scoring(kind: str, vocab_size: int, num_tokens: int) -> Run:
    """One measurement in a process of its own."""

    async def run(_: int) -> Sample:
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.memory_child", kind),
            *("--vocab", str(vocab_size), "--tokens", str(num_tokens)),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])},
            stdout=asyncio.subprocess.PIPE,
        )
        out, _err = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"the process ended with {process.returncode}")
        measured = json.loads(out)
        figures = {
            "before_mib": round(measured["before"] / MIB, 1),
            "extra_mib": round(measured["extra"] / MIB, 1),
        }
        return Sample(seconds=time.monotonic() - started, figures=figures)

    return run


def idle_sessions(number: int) -> Run:
    """A fresh server; the memory of a few sessions more is not counted, they warm it up."""

    async def run(_: int) -> Sample:
        started = time.monotonic()
        table = made_table(SESSION_TOKENS, 32)
        words = ["--tokens", str(SESSION_TOKENS), "--k", "32"]
        with server_process("benchmarks.teacher_process", words) as server:
            client = await connect(server.address)
            warm = await _scored(client, table, AT_ONCE)
            before = status_bytes("VmRSS", server.pid)
            held = await _scored(client, table, number)
            after = status_bytes("VmRSS", server.pid)
            await asyncio.gather(*(session.close() for session in warm + held))
            await client.aclose()
        figures = {
            "before_mib": round(before / MIB, 1),
            "extra_mib": round((after - before) / MIB, 1),
            "kib_per_session": round((after - before) / 1024 / number, 2),
        }
        return Sample(seconds=time.monotonic() - started, figures=figures)

    return run


async def _scored(client: TeacherClient, table: Table, number: int) -> list[TeacherSession]:
    """Sessions with a whole response scored, left open."""
    load = Load(k=32, append_tokens=256)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> TeacherSession:
        async with gate:
            session = client.open(PROMPT, load.options(), POLICY)
            for span in load.spans(table):
                await session.append(span)
            return session

    return list(await asyncio.gather(*(one() for _ in range(number))))


def shown(arms: dict[str, Measured]) -> RichTable:
    """Medians."""
    table = RichTable(title="resident memory", title_justify="left", pad_edge=False)
    table.add_column("arm")
    for title in ("before MiB", "extra MiB", "KiB a session"):
        table.add_column(title, justify="right")
    table.add_column("")
    for name, arm in arms.items():
        values = [arm.figure(key) for key in ("before_mib", "extra_mib", "kib_per_session")]
        cells = ["-" if value is None else f"{value:,.1f}" for value in values]
        table.add_row(name, *cells, arm.error or "")
    return table


def ratios(arms: dict[str, Measured]) -> dict[str, float | None]:
    """The worst of each kind over its limit: at most 1."""
    found: dict[str, float | None] = {}
    for kind in LENGTHS:
        extra = [arm.figure("extra_mib") for name, arm in arms.items() if name.startswith(kind)]
        known = [value for value in extra if value is not None]
        worst = max(known) / LIMITS["extra_mib_of_scoring"] if len(known) == len(extra) else None
        found[f"{kind}_worst_over_limit"] = None if worst is None else round(worst, 4)
    last = [arm for name, arm in arms.items() if name.startswith("sessions_")][-1]
    kib = last.figure("kib_per_session")
    found["idle_session_over_limit"] = (
        None if kib is None else round(kib / LIMITS["kib_per_idle_session"], 4)
    )
    return found


async def measure(
    *, quick: bool, repeats: int, console: Console, progress: Progress | None
) -> dict[str, Measured]:
    """All arms, in turns."""
    runs: dict[str, Run] = {}
    for kind, lengths in LENGTHS.items():
        for vocab_size in VOCABULARIES:
            for num_tokens in lengths[:1] if quick else lengths:
                name = f"{kind}_v{vocab_size}_t{num_tokens}"
                runs[name] = scoring(kind, vocab_size, num_tokens)
    for number in (200,) if quick else SESSIONS:
        runs[f"sessions_{number}"] = idle_sessions(number)
    arms = {name: Measured(description=name.split("_")[0]) for name in runs}
    if progress:
        progress.restore(arms)
    await interleave(
        runs,
        arms,
        repeats=repeats,
        pause_s=0.0,
        warm_up=False,  # every process is a new one
        said=lambda line: console.print(line, highlight=False),
        kept=lambda: progress.keep(arms) if progress else None,
    )
    return arms


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small part, once")
    parser.add_argument("--repeats", type=int, default=5, help="of each arm (default 5)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    console = wide_console()
    repeats = 1 if arguments.quick else arguments.repeats
    settings = {"limits": LIMITS, "session_tokens": SESSION_TOKENS, "repeats": repeats}
    progress = Progress(arguments.json, settings) if arguments.json else None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        arms = runner.run(
            measure(quick=arguments.quick, repeats=repeats, console=console, progress=progress)
        )
    found = ratios(arms)
    console.print(shown(arms), ratio_table(found))
    if progress:
        write(arguments.json, arms, found, settings)
        progress.done()
    return 1 if any(arm.error for arm in arms.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
