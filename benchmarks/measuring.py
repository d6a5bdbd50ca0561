"""Runs arms in turns, and what their seconds come to: medians, spread, ratios, a table, a file.

Arms are interleaved, and every repeat begins with another one, so that a slow minute of the machine
falls on all of them. An arm that fails stays in the table with its error.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.processes import first_line
from benchmarks.provenance import provenance
from student_trainer.process.writing import write_whole

TABLE_WIDTH = 110
SAMPLE_LIMIT_S = 1800.0
"""Of one run of one arm."""
PAUSE_S = 1.5
"""Between two runs: an idle vLLM goes on polling for up to a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of one arm."""

    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    """Whatever else was measured, by name."""


@dataclass(slots=True, kw_only=True)
class Measured:
    """All runs of one arm; `error` is why there are no more."""

    description: str = ""
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None

    @property
    def median_s(self) -> float | None:
        """None for an arm that failed: half of its runs say nothing."""
        return None if self.error or not self.samples else median(s.seconds for s in self.samples)

    def figure(self, name: str) -> float | None:
        """The median of a figure; None where the arm failed or has no such figure."""
        values = [s.figures[name] for s in self.samples if name in s.figures]
        return None if self.error or not values else median(values)

    def record(self) -> dict[str, Any]:
        """As it stands in the file."""
        seconds = [round(sample.seconds, 6) for sample in self.samples]
        names = sorted({name for sample in self.samples for name in sample.figures})
        return {
            "description": self.description,
            "seconds": seconds,
            "median": self.median_s,
            "spread": [min(seconds), max(seconds)] if seconds else None,
            "error": self.error,
            "figures": {
                name: {
                    "values": [s.figures[name] for s in self.samples if name in s.figures],
                    "median": self.figure(name),
                }
                for name in names
            },
        }


Run = Callable[[int], Awaitable[Sample]]
"""Runs an arm once; is told the number of the repeat, from 0, and -1 for the one to warm up."""


async def interleave(
    runs: Mapping[str, Run],
    arms: Mapping[str, Measured],
    *,
    repeats: int,
    pause_s: float = PAUSE_S,
    limit_s: float = SAMPLE_LIMIT_S,
    warm_up: bool = True,
    said: Callable[[str], None] = lambda line: None,
    kept: Callable[[], None] = lambda: None,
) -> None:
    """Adds a sample a repeat to each arm, after one that is not counted to warm up; stops where
    one fails.

    An arm that has samples already goes on from there; `kept` is called after every new one.
    """
    names = list(runs)
    for repeat in range(-1 if warm_up else 0, repeats):
        for name in turned(names, max(repeat, 0)):
            arm = arms[name]
            if arm.error or len(arm.samples) > repeat >= 0:
                continue
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(limit_s):
                    sample = await runs[name](repeat)
            except TimeoutError:
                arm.error = f"no result within {limit_s:.0f} s"
            except Exception as error:  # noqa: BLE001 - whatever fails in an arm is its result
                arm.error = first_line(error)
            else:
                if repeat >= 0:
                    arm.samples.append(sample)
                    kept()
            which = "warm-up" if repeat < 0 else f"repeat {repeat + 1}/{repeats}"
            said(f"{which} {name}: {arm.error or f'{sample.seconds:.3f} s'}")


def turned(names: Sequence[str], by: int) -> list[str]:
    """The names, beginning with another one."""
    start = by % len(names) if names else 0
    return [*names[start:], *names[:start]]


def ratio(arms: Mapping[str, Measured], over: str, under: str) -> float | None:
    """median(over) / median(under); None where either has failed or is not there."""
    if over not in arms or under not in arms:
        return None
    upper, lower = arms[over].median_s, arms[under].median_s
    return None if upper is None or not lower else round(upper / lower, 4)


def fastest(arms: Mapping[str, Measured], names: Sequence[str]) -> str | None:
    """The name with the smallest median among those that have one."""
    medians = {
        name: value for name in names if name in arms and (value := arms[name].median_s) is not None
    }
    return min(medians, key=medians.__getitem__) if medians else None


def table(
    title: str,
    arms: Mapping[str, Measured],
    *,
    reference: str | None,
    figures: Mapping[str, str] | None = None,
) -> Table:
    """A row an arm: median, spread, ratio to a reference, `figures` (name -> format); below it why
    arms have failed."""
    figures = figures or {}
    failures = [f"{name}: {arm.error}" for name, arm in arms.items() if arm.error]
    made = Table(
        title=title,
        title_justify="left",
        pad_edge=False,
        caption=Text("\n".join(failures), style="red") if failures else None,
        caption_justify="left",
    )
    made.add_column("arm", no_wrap=True)
    over = [f"/ {reference}"] if reference else []
    for column in ("median s", "min - max s", *over, *(_heading(name) for name in figures)):
        made.add_column(column, justify="right", no_wrap=column == "min - max s")
    for name, arm in arms.items():
        seconds = [sample.seconds for sample in arm.samples]
        made.add_row(
            name,
            "failed" if arm.error else _shown(arm.median_s, ".3f"),
            f"{min(seconds):.3f} - {max(seconds):.3f}" if seconds else "-",
            *([_shown(ratio(arms, name, reference), ".2f")] if reference else []),
            *(_shown(arm.figure(figure), form) for figure, form in figures.items()),
        )
    return made


def _heading(figure: str) -> str:
    return figure.replace("_per_", "/").replace("_", " ")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def wide_console() -> Console:
    """As wide as every table needs where the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)


def ratio_table(ratios: Mapping[str, float | None]) -> Table:
    """The named ratios."""
    made = Table(title="ratios of medians", title_justify="left", pad_edge=False)
    made.add_column("ratio")
    made.add_column("value", justify="right")
    for name, value in ratios.items():
        made.add_row(name, _shown(value, ".3f"))
    return made


def write(
    path: Path,
    arms: Mapping[str, Measured],
    ratios: Mapping[str, float | None],
    settings: Mapping[str, Any],
) -> None:
    """The result file, replaced in one go."""
    content = {
        "made": provenance(),
        "settings": dict(settings),
        "ratios": dict(ratios),
        "arms": {name: arm.record() for name, arm in arms.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")
