"""How many trainers a teacher serves: simulated fleets beside the arithmetic, and a day of them.

    python -m benchmarks.capacity --json PATH        fleets, each beside its forecast
    python -m benchmarks.capacity --quick            two of them, for a short while
    python -m benchmarks.capacity --day --json PATH  24 hours of trainers that come and go
    python -m benchmarks.capacity --plan             the tables of docs/scaling.md

Real clients over gRPC to real teacher processes on the fake engine, whose cost a step and a token
is told. The exit code is 1 where the arithmetic misses by more than a tenth what it says that it
holds (tokens a second, seconds a step, open sessions), or a row is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.capacity.day import HOURS, broken, run_day
from benchmarks.capacity.fleets import COMPARED, FLEETS, Fleet, run_fleet
from benchmarks.capacity.plan import write_tables
from benchmarks.measuring import Measured, Sample, ratio_table, table, wide_console, write
from benchmarks.processes import first_line, run
from benchmarks.progress import Progress
from benchmarks.provenance import ROOT, provenance
from student_trainer.process.writing import write_whole

REPEATS, SECONDS, WARM_S = 3, 180.0, 30.0
QUICK_FLEETS, QUICK_SECONDS, QUICK_WARM_S = ("one", "slow_and_full"), 45.0, 10.0
HELD, LIMIT = ("tokens_per_s", "step_s", "open_sessions"), 0.1
"""What the arithmetic answers for, and how far it may be off."""
SHOWN = {
    "forecast_used_share": ".2f",
    "tokens_per_s": ".0f",
    "step_s": ".1f",
    "open_sessions": ".1f",
    "append_s": ".2f",
}


def comparison(arms: Mapping[str, Measured]) -> dict[str, float | None]:
    """Seen over forecast, medians of repeats; None where a fleet failed."""
    found: dict[str, float | None] = {}
    for name, arm in arms.items():
        for figure in COMPARED:
            seen, said = arm.figure(figure), arm.figure(f"forecast_{figure}")
            found[f"{figure}_{name}"] = round(seen / said, 4) if seen and said else None
    return found


def missed(ratios: Mapping[str, float | None]) -> list[str]:
    """What the arithmetic answers for and does not hold."""
    return [
        name
        for name, value in ratios.items()
        if name.startswith(HELD) and (value is None or abs(value - 1) > LIMIT)
    ]


async def fleets(arguments: argparse.Namespace, console: Console) -> int:
    quick = arguments.quick
    names = arguments.fleets or (QUICK_FLEETS if quick else list(FLEETS))
    seconds = arguments.seconds or (QUICK_SECONDS if quick else SECONDS)
    warm_s = QUICK_WARM_S if quick else WARM_S
    repeats = 1 if quick else arguments.repeats
    chosen = {name: FLEETS[name] for name in names}
    arms = {name: Measured(description=fleet.description) for name, fleet in chosen.items()}
    settings = {"seconds": seconds, "warm_up_s": warm_s, "repeats": repeats, "limit": LIMIT}
    progress = Progress(arguments.json, settings)
    progress.restore(arms)
    # They wait most of the time: several beside each other change nothing of each other.
    places = asyncio.Semaphore(arguments.at_once)

    async def one(name: str, fleet: Fleet, repeat: int) -> None:
        arm = arms[name]
        async with places:
            if arm.error:
                return
            try:
                sample: Sample = await run_fleet(
                    fleet, f"{name}-{repeat}", seed=repeat + 1, warm_s=warm_s, seconds=seconds
                )
            except Exception as error:  # noqa: BLE001 - whatever fails in an arm is its result
                arm.error = first_line(error)
            else:
                arm.samples.append(sample)
                progress.keep(arms)
            console.print(f"{name} {repeat + 1}/{repeats}: {arm.error or 'done'}", highlight=False)

    await asyncio.gather(
        *(
            one(name, fleet, repeat)
            for repeat in range(repeats)
            for name, fleet in chosen.items()
            if len(arms[name].samples) <= repeat
        )
    )
    ratios = comparison(arms)
    write(arguments.json, arms, ratios, settings)
    progress.done()
    console.print(table("fleets", arms, reference=None, figures=SHOWN))
    console.print(ratio_table(ratios))
    if bad := missed(ratios):
        console.print(f"off by more than {LIMIT:.0%}: {', '.join(bad)}")
    return 1 if bad else 0


async def day(arguments: argparse.Namespace, console: Console) -> int:
    progress = arguments.json.with_suffix(".progress")
    said: dict[str, Any] = await run_day(
        progress, arguments.hours, lambda line: console.print(line, highlight=False)
    )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.json, json.dumps({"made": provenance(), "day": said}, indent=1) + "\n")
    bad = broken(said)
    console.print("; ".join(bad) if bad else "no row lost, nothing grew past its bound")
    return 1 if bad else 0


def count(text: str) -> int:
    """Of 1 or more; raises ValueError, ArgumentTypeError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}, must be at least 1")
    return number


def duration(text: str) -> float:
    """Seconds, more than 0; raises ValueError, ArgumentTypeError."""
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} s, must be more than 0 and finite")
    return seconds


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, metavar="PATH", help="results")
    made.add_argument("--quick", action="store_true", help="two fleets, for a short while")
    made.add_argument("--day", action="store_true", help="trainers that come and go")
    made.add_argument("--plan", action="store_true", help="write the tables of docs/scaling.md")
    made.add_argument("--hours", type=count, default=HOURS, help=f"of the day ({HOURS})")
    made.add_argument("--fleets", nargs="+", choices=FLEETS, metavar="NAME", help="only these")
    made.add_argument("--repeats", type=count, default=REPEATS, help=f"of each fleet ({REPEATS})")
    made.add_argument("--seconds", type=duration, help=f"a fleet is looked at ({SECONDS:.0f})")
    made.add_argument("--at-once", type=count, default=3, help="fleets at a time (3)")
    return made


def main() -> int:
    arguments = parser().parse_args()
    if arguments.plan:
        write_tables()
        return 0
    name = "day" if arguments.day else "fleets"
    arguments.json = arguments.json or ROOT / "runs" / f"bench-capacity-{name}.json"
    work = day if arguments.day else fleets
    return run(work(arguments, wide_console()))


if __name__ == "__main__":
    sys.exit(main())
