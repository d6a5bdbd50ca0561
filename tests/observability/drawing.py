"""A dashboard's panels, drawn from the answers to their queries: what Grafana would show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image

from tests.observability.prometheus import Series
from tests.observability.promql import panels

COLUMNS = 3
UNITS = {"percentunit": (100.0, "%"), "bytes": (2.0**-20, "MiB"), "s": (1.0, "s")}
"""Factor and name."""
MOST_NAMED = 8
"""Curves that a legend names."""


def legend_of(template: str, labels: Mapping[str, str]) -> str:
    """What Grafana calls a curve; ports alone, as all are on one host here."""
    text = re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m[1], ""), template)
    return text.replace("127.0.0.1", "")


def draw(
    dashboard: dict[str, Any], answers: Mapping[str, Sequence[Series]], start_s: float, path: Path
) -> None:
    """One picture of all panels; `answers` by the query's text."""
    drawn = panels(dashboard)
    num_rows = -(-len(drawn) // COLUMNS)
    figure, axes = plt.subplots(
        num_rows, COLUMNS, figsize=(5 * COLUMNS, 2.3 * num_rows), squeeze=False, dpi=72
    )
    for index, axis in enumerate(axes.flat):
        if index < len(drawn):
            _draw_panel(axis, drawn[index], answers, start_s)
        else:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    with Image.open(path) as full:
        full.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)


def _draw_panel(
    axis: Any, panel: dict[str, Any], answers: Mapping[str, Sequence[Series]], start_s: float
) -> None:
    factor, unit = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], (1.0, ""))
    curves = [
        (legend_of(target["legendFormat"], series.labels), series)
        for target in panel["targets"]
        for series in answers[target["expr"]]
    ]
    if "stacking" in panel["fieldConfig"]["defaults"]["custom"]:
        _draw_stack(axis, curves, factor, start_s)
    else:
        for number, (name, series) in enumerate(curves):
            at = [t - start_s for t in series.at_s]
            label = name if number < MOST_NAMED else None
            axis.plot(at, [factor * v for v in series.values], label=label, linewidth=1)
    axis.set_title(panel["title"] + (f" ({unit})" if unit else ""), fontsize=9)
    axis.tick_params(labelsize=7)
    if panel["fieldConfig"]["defaults"].get("min") == 0:
        axis.set_ylim(bottom=0)
    axis.legend(fontsize=6, loc="upper left", ncols=2, framealpha=0.6)


def _draw_stack(axis: Any, curves: list[tuple[str, Series]], factor: float, start_s: float) -> None:
    """Of the first run alone: shares of several on top of each other say nothing."""
    first = curves[0][1].labels.get("run")
    shown = [(name, series) for name, series in curves if series.labels.get("run") == first]
    at = sorted({t for _, series in shown for t in series.at_s})
    known = [dict(zip(series.at_s, series.values, strict=True)) for _, series in shown]
    values = [[factor * one.get(t, 0.0) for t in at] for one in known]
    axis.stackplot([t - start_s for t in at], values, labels=[name for name, _ in shown])
