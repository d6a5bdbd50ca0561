"""Every figure of every run as a small curve and four numbers: so that none is in no picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from run_report.figures import RunFigures

WIDTH, HEIGHT, PAD = 160, 34, 2
MAX_POINTS = 160
OTHER = "other"
MANY = 1000
"""From here on without decimals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One figure of one run."""

    run: int
    """Its number, which gives the colour."""
    first: str
    last: str
    low: str
    high: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """One figure: its curves, drawn over each other, and the numbers of each."""

    name: str
    kind: str
    """step or eval."""
    picture: Markup
    lines: Sequence[Line]


def small_multiples(runs: Sequence[RunFigures]) -> dict[str, list[Small]]:
    """Every figure by its group."""
    grouped: dict[str, list[Small]] = {}
    for kind, name in dict.fromkeys(key for run in runs for key in run.names()):
        group = next((g for run in runs if (g := run.groups(name))), OTHER)
        series = [
            (number, *(run.series(name) if kind == "step" else run.evaluated(name)))
            for number, run in enumerate(runs)
        ]
        there = [(number, steps, values) for number, steps, values in series if len(values)]
        small = Small(
            name=name,
            kind=kind,
            picture=_picture(there),
            lines=[_line(number, values) for number, _, values in there],
        )
        grouped.setdefault(group, []).append(small)
    order = [*dict.fromkeys(name for run in runs for name in run.group_order)]
    known = sorted(grouped, key=lambda name: order.index(name) if name in order else len(order))
    return {name: grouped[name] for name in known}


def _line(number: int, values: NDArray[np.float64]) -> Line:
    first, last, low, high = map(_number, (values[0], values[-1], values.min(), values.max()))
    return Line(run=number, first=first, last=last, low=low, high=high)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= MANY else f"{value:.4g}"


def _picture(series: Sequence[tuple[int, NDArray[np.int64], NDArray[np.float64]]]) -> Markup:
    low = min(values.min() for _, _, values in series)
    high = max(values.max() for _, _, values in series)
    left = min(steps[0] for _, steps, _ in series)
    right = max(steps[-1] for _, steps, _ in series)
    parts = []
    for number, steps, values in series:
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).astype(int))
        x = PAD + (steps[kept] - left) / max(1, right - left) * (WIDTH - 2 * PAD)
        y = HEIGHT - PAD - (values[kept] - low) / ((high - low) or 1.0) * (HEIGHT - 2 * PAD)
        if high == low:
            y = np.full(len(x), HEIGHT / 2)
        color = f"var(--c{number % 6})"
        if len(x) == 1:
            parts.append(f'<circle cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="2" fill="{color}"/>')
            continue
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="spark" aria-hidden="true">'
    return Markup(f"{head}{''.join(parts)}</svg>")
