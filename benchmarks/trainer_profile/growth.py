"""How each phase of a step grows with rollouts and with tokens, one axis at a time."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rich.table import Table

from benchmarks.trainer_profile.steps import Step

ROLLOUTS, TOKENS = 16, 128
PHASES = ("rollout", "learn", "sync")


async def growth(
    take: Callable[..., Awaitable[Step]],
    axes: Mapping[str, Sequence[int]],
    *,
    repeats: int,
    said: Callable[[str], None],
) -> dict[str, Any]:
    """Median seconds by phase for every value of an axis, and the exponents that fit them."""
    found: dict[str, Any] = {}
    await take("step", rollouts=ROLLOUTS, max_tokens=TOKENS)
    for axis, values in axes.items():
        steps: dict[int, list[Step]] = {value: [] for value in values}
        for _ in range(repeats):
            for value in values:
                question = {"rollouts": ROLLOUTS, "max_tokens": TOKENS} | {axis: value}
                step = await take("step", **question)
                steps[value].append(step)
                said(f"{axis} {value}: {step}")
        seconds = {
            phase: {
                value: median(_seconds(step, phase) for step in steps[value]) for value in values
            }
            for phase in PHASES
        }
        found[axis] = {
            "seconds": seconds,
            "tokens": {value: median(step.kept for step in steps[value]) for value in values},
            "exponents": {phase: round(exponent(seconds[phase]), 3) for phase in PHASES},
        }
    return found


def _seconds(step: Step, name: str) -> float:
    phase = step.phase(name)
    assert phase is not None
    return phase.seconds


def exponent(seconds: Mapping[int, float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    sizes = [math.log(size) for size in seconds]
    times = [math.log(time) for time in seconds.values()]
    size, time = fmean(sizes), fmean(times)
    slope = sum((x - size) * (y - time) for x, y in zip(sizes, times, strict=True))
    return slope / sum((x - size) ** 2 for x in sizes)


def growth_table(grown: Mapping[str, Any]) -> Table:
    """A row a phase and axis."""
    table = Table(title="seconds, by size", title_justify="left", pad_edge=False)
    for column in ("axis", "phase", "sizes", "seconds", "exponent"):
        table.add_column(column)
    for axis, figures in grown.items():
        for phase, seconds in figures["seconds"].items():
            table.add_row(
                axis,
                phase,
                " ".join(map(str, seconds)),
                " ".join(f"{value:.2f}" for value in seconds.values()),
                f"{figures['exponents'][phase]:.2f}",
            )
    return table
