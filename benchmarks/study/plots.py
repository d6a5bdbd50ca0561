"""Plots of the study: accuracy over tokens and over time, overlap by position, response lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.arms import ROOT
from benchmarks.study.results import target

FOLDER = ROOT / "docs" / "study"
GROUPS = {
    "pruning": ("opd", "topk", "topk_stop", "prune_batch", "prune_stop", "prune_both"),
    "position": ("opd", "first30", "last30", "cutoff25", "cutoff50", "progressive", "iw"),
    "support": ("opd", "lsm", "lsm_no_top_p", "lsm_no_renorm", "lsm_neither"),
    "reuse": ("opd", "reuse", "reuse_block", "reuse_token", "reuse_sequence"),
    "high": ("high_opd", "high_topk", "high_topk_stop", "high_prune_batch", "high_prune_both"),
}
"""Plot -> the arms it compares."""
RIGHT_ANSWER_TOKENS = 256
COLORS = ("#444444", "#4878a8", "#d1605e", "#6aa66a", "#c9a227", "#85629b", "#8c6d46")


def write_plots(arms: Mapping[str, Any]) -> list[str]:
    """One file a group that has results; returns their paths."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    written = []
    for group, names in GROUPS.items():
        present = [name for name in names if name in arms]
        if len(present) < 2:
            continue
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        tokens, seconds = figure.subplots(1, 2, sharey=True)
        _curves(tokens, arms, present, "generated_tokens", "generated tokens, thousands", 1e-3)
        _curves(seconds, arms, present, "wall_s", "wall time of the steps, s", 1.0)
        tokens.set_ylabel("held-out exact match")
        goal = target(arms, arms[present[0]]["pair"])
        for axes in (tokens, seconds):
            if goal is not None:
                label = "where full OPD ends"
                axes.axhline(goal, color="#777777", linewidth=0.9, linestyle=":", label=label)
        figure.legend(
            *tokens.get_legend_handles_labels(), loc="outside right center", frameon=False
        )
        written.append(_save(figure, group))
    written.append(_overlap_and_lengths(arms))
    return written


def _save(figure: Figure, name: str) -> str:
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=110)
    return str(path)


def _curves(
    axes: Axes, arms: Mapping[str, Any], names: Sequence[str], cost: str, label: str, scale: float
) -> None:
    """Mean over seeds at each evaluation; the band is the range over seeds."""
    for name, color in zip(names, COLORS, strict=False):
        curves = [record["curve"] for record in arms[name]["seeds"] if not record["error"]]
        if not curves:
            continue
        points = list(zip(*curves, strict=True))
        x = [scale * np.mean([p[cost] for p in at]) for at in points]
        accuracy = np.array([[p["accuracy"] for p in at] for at in points])
        axes.plot(
            x,
            accuracy.mean(axis=1),
            color=color,
            marker="o",
            markersize=3,
            label=arms[name]["label"],
        )
        axes.fill_between(
            x, accuracy.min(axis=1), accuracy.max(axis=1), color=color, alpha=0.12, linewidth=0
        )
    axes.set_xlabel(label)
    axes.set_ylim(-0.02, 1.02)
    axes.spines[["top", "right"]].set_visible(False)


def _overlap_and_lengths(arms: Mapping[str, Any]) -> str:
    """Overlap by position before and after full OPD, and how far the batch controller opens."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    overlap, window = figure.subplots(1, 2)
    for name, color in (("opd", "#444444"), ("high_opd", "#4878a8")):
        if name not in arms:
            continue
        for when, style in (("first", "--"), ("last", "-")):
            bands = [r["overlap_by_band"][when] for r in arms[name]["seeds"]]
            bands = [band for band in bands if band is not None]
            if not bands:
                continue
            shortest = min(map(len, bands))
            mean = np.mean([band[:shortest] for band in bands], axis=0)
            pair = "low" if name == "opd" else "high"
            overlap.plot(
                16 * np.arange(shortest), mean, style, color=color, label=f"{pair}, {when} step"
            )
    overlap.axvline(RIGHT_ANSWER_TOKENS, color="#777777", linewidth=0.9, linestyle=":")
    overlap.annotate("a right answer ends", (RIGHT_ANSWER_TOKENS + 4, 1.0), fontsize=8)
    overlap.set_xlabel("response position, tokens")
    overlap.set_ylabel("top-3 overlap with the teacher")
    for name, color in (
        ("prune_batch", "#444444"),
        ("prune_both", "#999999"),
        ("high_prune_batch", "#4878a8"),
        ("high_prune_both", "#9ec1de"),
    ):
        if name in arms:
            windows = [r["max_tokens"] for r in arms[name]["seeds"] if not r["error"]]
            if windows:
                pair = arms[name]["pair"]
                mean = np.mean(windows, axis=0)
                style = "--" if "both" in name else "-"
                window.plot(
                    np.arange(1, len(mean) + 1),
                    mean,
                    style,
                    color=color,
                    marker="o",
                    markersize=3,
                    label=f"{pair}: {arms[name]['label']}",
                )
    window.set_xlabel("step")
    window.set_ylabel("longest response of the next step, tokens")
    for axes in (overlap, window):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, "overlap_and_window")
