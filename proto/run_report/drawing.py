"""A matplotlib figure as a picture in a page, in the page's own colours, and as a PNG file.

The drawing has a few colours of its own; in the SVG each becomes a variable of the page's style,
which is light or dark as its reader has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#10151c", "#59636f", "#d3d8de"
SERIES = ("#1c5fa8", "#c35413", "#2a7a4b", "#84489e", "#a8202c", "#6c6a12")
"""Runs, one after another; a seventh has the first one's colour again."""
STOPPED, GOOD, BAD = SERIES[4], SERIES[2], SERIES[1]
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{color: f"--c{number}" for number, color in enumerate(SERIES)},
}
WIDTH, HEIGHT = 5.4, 3.3
"""Inches of one picture; at 72 dots each it fits a telephone."""
PNG_DPI, OVERVIEW_DPI = 130, 100
ABOVE = "above"
"""Label of a legend that stands above its axes."""
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One picture, drawn when it is asked for."""

    name: str
    """Of its file."""
    title: str
    caption: str
    """What it shows and how to read it: a sentence or two."""
    draw: Callable[[Axes], None]
    height: float = HEIGHT

    def svg(self) -> str:
        """An `<svg>` for a page, as wide as its place."""
        out = StringIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self._figure().savefig(
                out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
        return _inline(out.getvalue(), self.name, self.title)

    def save(self, folder: Path) -> Path:
        """NAME.png, on white."""
        path = folder / f"{self.name}.png"
        with mpl.rc_context(STYLE):
            self._figure().savefig(path, dpi=PNG_DPI, facecolor="white")
        return path

    def _figure(self) -> Figure:
        figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
        self.draw(figure.subplots())
        return figure


def overview(charts: Sequence[Chart], path: Path) -> Path:
    """Several of them in one PNG file, three in a row."""
    columns = min(3, len(charts))
    rows = -(-len(charts) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for chart, axis in zip(charts, axes, strict=False):
            chart.draw(axis)
            above = axis.get_legend() is not None and axis.get_legend().get_label() == ABOVE
            axis.set_title(plain(chart.title), pad=24 if above else None)
        for axis in axes[len(charts) :]:
            axis.remove()
        figure.savefig(path, dpi=OVERVIEW_DPI, facecolor="white")
    return path


def legend(axis: Axes, **options: Any) -> None:
    """Where there is more than one thing to tell apart."""
    _, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        axis.legend(**options)


def legend_above(axis: Axes, ncols: int) -> None:
    """For what fills its axes."""
    made = axis.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=ncols)
    made.set_label(ABOVE)


def plain(name: str) -> str:
    """A name for matplotlib, drawn as it stands: `$` begins no mathematics, and a legend does not
    leave out what begins with an underscore."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def say(axis: Axes, text: str) -> None:
    """In place of what is not there."""
    axis.text(
        0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=MUTED, wrap=True
    )
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


def _inline(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height|xmlns:xlink|version)="[^"]*"', "", head)
    head += f' role="img" aria-label="{escape(title)}"'
    # Ids of several pictures in one page must differ; what refers to them refers to their own.
    rest = re.sub(r'(\bid=")', rf"\g<1>{name}-", rest)
    rest = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", rest)
    rest = rest.replace("xlink:href", "href")
    for color, variable in VARIABLES.items():
        rest = rest.replace(color, f"var({variable})")
    return f"{head}>{rest}".strip()
