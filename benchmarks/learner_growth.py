"""How an update of the learner grows: with the sequence, the rank of an adapter, and processes.

    python -m benchmarks.learner_growth --json PATH
    python -m benchmarks.learner_growth --quick        fewer repeats, shorter sequences

tokens     one sequence of so many, all weights trained, one process
rank       an adapter of this rank on four sequences, one process
processes  the same batch on one process with every core, and spread over two by FSDP2, each with
           half of the cores and of the sequences

An update is forward, backward and AdamW, of a small random student in float32. Every measurement
is a start of its own, warmed up; arms are in turns. Exponents are the slopes of log seconds over
log size: attention alone may be above 1.1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.learner import measured_by
from benchmarks.measuring import Measured, Run, interleave, wide_console, write
from benchmarks.progress import Progress
from benchmarks.provenance import ROOT
from benchmarks.trainer_profile.growth import exponent

TOKENS = (512, 1024, 2048, 4096, 8192)
RANKS = (8, 16, 32, 64, 128)
PROCESSES = (1, 2)
BATCH = {"sequences": 4, "tokens": 1024}
REPEATS, QUICK_REPEATS = 5, 2
CHILD = "benchmarks.learner_growth_child"


def measurement(*, processes: int = 1, rank: int = 0, sequences: int, tokens: int) -> Run:
    """One start."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [f"--rank={rank}", f"--sequences={sequences}", f"--tokens={tokens}"]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    command = [*(launcher if processes > 1 else []), "-m", CHILD, *words]
    return measured_by(command, OMP_NUM_THREADS=str(threads))


def axes(quick: bool) -> dict[str, dict[int, Run]]:
    """Axis -> value -> its run."""
    return {
        "tokens": {
            n: measurement(sequences=1, tokens=n) for n in (TOKENS[:3] if quick else TOKENS)
        },
        "rank": {n: measurement(rank=n, **BATCH) for n in (RANKS[::2] if quick else RANKS)},
        "processes": {n: measurement(processes=n, **BATCH) for n in PROCESSES},
    }


def grown(arms: Mapping[str, Measured], values: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Seconds, tokens a second and the exponent of every axis; none where a run failed."""
    found: dict[str, Any] = {}
    for axis, sizes in values.items():
        seconds = {size: arms[f"{axis}_{size}"].median_s for size in sizes}
        known = {size: value for size, value in seconds.items() if value is not None}
        tokens = {
            size: (size if axis == "tokens" else BATCH["sequences"] * BATCH["tokens"]) / value
            for size, value in known.items()
        }
        found[axis] = {
            "seconds": known,
            "tokens_per_s": {size: round(value, 1) for size, value in tokens.items()},
            "exponent": round(exponent(known), 3) if len(known) == len(sizes) else None,
        }
    return found


def growth_table(found: Mapping[str, Any]) -> Table:
    """A row an axis."""
    table = Table(title="an update of the learner, by size", title_justify="left", pad_edge=False)
    for column in ("axis", "sizes", "seconds", "tokens a second", "exponent"):
        table.add_column(column)
    for axis, figures in found.items():
        seconds, rates = figures["seconds"], figures["tokens_per_s"]
        slope = figures["exponent"]
        table.add_row(
            axis,
            " ".join(map(str, seconds)),
            " ".join(f"{value:.2f}" for value in seconds.values()),
            " ".join(f"{value:,.0f}" for value in rates.values()),
            "" if slope is None else f"{slope:.2f}",
        )
    return table


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.learner_growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "bench-learner-growth.json"
    made.add_argument("--quick", action="store_true", help="fewer repeats, shorter sequences")
    made.add_argument("--json", type=Path, default=default, metavar="PATH", help="results")
    made.add_argument("--repeats", type=int, help=f"of each ({REPEATS}, quick {QUICK_REPEATS})")
    return made


def main(words: Sequence[str] | None = None, console: Console | None = None) -> int:
    arguments, console = parser().parse_args(words), console or wide_console()
    repeats = arguments.repeats or (QUICK_REPEATS if arguments.quick else REPEATS)
    runs = axes(arguments.quick)
    settings = {"quick": arguments.quick, "repeats": repeats, **BATCH}
    chosen = {f"{axis}_{size}": run for axis, by in runs.items() for size, run in by.items()}
    arms = {name: Measured(description="learner") for name in chosen}
    progress = Progress(arguments.json, settings)
    progress.restore(arms)
    asyncio.run(
        interleave(
            chosen,
            arms,
            repeats=repeats,
            pause_s=0.0,
            warm_up=False,  # every start is a new one and warms itself up
            said=lambda line: console.print(line, highlight=False),
            kept=lambda: progress.keep(arms),
        )
    )
    found = grown(arms, {axis: [*by] for axis, by in runs.items()})
    console.print(growth_table(found))
    exponents = {f"exponent_{axis}": figures["exponent"] for axis, figures in found.items()}
    write(arguments.json, arms, exponents, settings)
    progress.done()
    return 1 if any(arm.error for arm in arms.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
