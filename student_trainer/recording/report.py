"""What a run showed: summary.json, report.png and a table, from the files the run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from student_trainer.errors import DatasetError
from student_trainer.recording.run_log import METRICS_FILE, PROFILES_FILE, read_lines

PHASES = ("generate", "teacher_wait", "learn", "sync")
COLORS = {"generate": "#4878a8", "teacher_wait": "#c44e52", "learn": "#6aa66a", "sync": "#c9a227"}
NEEDED = {
    "step": (
        "generated_tokens",
        "kept_tokens",
        "overshoot_tokens",
        "rollouts",
        "sync_gap_nats",
        "truncated_rollouts",
        *(f"seconds_{phase}" for phase in PHASES),
    ),
    "eval": ("accuracy",),
    "skipped": ("unscored_rollouts",),
    "warning": ("warning", "message"),
}
"""What the report reads, by kind of record."""
FIRST, LAST = "#9aa5b1", "#1f4e79"
MIN_BAND_SHARE = 0.1
"""A position band is drawn when at least this share of the rollouts reaches it."""


def summarize(folder: Path, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The figures of a run; tokens are totals over all steps, shares are of the loop's wall time.

    `extra` is added as it is (a teacher's accuracy, say). Raises DatasetError when the folder holds
    no finished step, or a line of a file is broken.
    """
    steps, evals, warned = _records(folder)
    totals = {
        name: int(sum(s[name] for s in steps))
        for name in ("generated_tokens", "kept_tokens", "overshoot_tokens", "truncated_rollouts")
    }
    seconds = {phase: sum(s[f"seconds_{phase}"] for s in steps) for phase in PHASES}
    wall_s = sum(seconds.values())
    truncated = [s for s in steps if s["truncated_rollouts"]]
    summary: dict[str, Any] = {
        "steps": len(steps),
        "wall_s": round(wall_s, 2),
        **totals,
        "truncated_rollouts_first_step": int(steps[0]["truncated_rollouts"]),
        "truncated_rollouts_last_step": int(steps[-1]["truncated_rollouts"]),
        "rollouts_per_step": int(steps[0]["rollouts"]),
        "share": {phase: round(seconds[phase] / wall_s, 4) for phase in PHASES},
        "sync_gap_nats_max": max(s["sync_gap_nats"] for s in steps),
    }
    if truncated:
        rollouts = sum(s["truncated_rollouts"] for s in truncated)
        summary["overshoot_mean"] = round(totals["overshoot_tokens"] / rollouts, 2)
        summary["overshoot_bound_mean"] = round(
            sum(s["overshoot_bound_mean"] * s["truncated_rollouts"] for s in truncated) / rollouts,
            2,
        )
    if evals:
        summary |= {
            "accuracy_before": evals[0]["accuracy"],
            "accuracy_after": evals[-1]["accuracy"],
            "pass_at_1_before": evals[0].get("pass_at_1"),
            "pass_at_1_after": evals[-1].get("pass_at_1"),
            "pass_at_k_before": evals[0].get("pass_at_k"),
            "pass_at_k_after": evals[-1].get("pass_at_k"),
        }
    if warned:
        summary["warnings"] = _by_kind(warned)
    return summary | (extra or {})


def _by_kind(warned: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Warning -> at how many steps, which were the first and last, and what it last said."""
    kinds: dict[str, dict[str, Any]] = {}
    for record in warned:
        about = kinds.setdefault(record["warning"], {"steps": 0, "first_step": record["step"]})
        about["steps"] += 1
        about |= {"last_step": record["step"], "message": record["message"]}
    return kinds


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """summary.json in the run's folder."""
    path = folder / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return path


def summary_table(summary: dict[str, Any]) -> Table:
    """The summary as a person reads it."""
    table = Table(title="what the run did", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    if "accuracy_before" in summary:
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        table.add_row("student, exact match", f"{before:.1%} → {after:.1%}")
    if "teacher_accuracy" in summary:
        table.add_row("teacher, exact match", f"{summary['teacher_accuracy']:.1%}")
    for name in ("pass_at_1", "pass_at_k"):
        if summary.get(f"{name}_before") is not None and summary.get(f"{name}_after") is not None:
            values = f"{summary[f'{name}_before']:.1%} → {summary[f'{name}_after']:.1%}"
            table.add_row(f"student, {name.replace('_at_', '@')}", values)
    table.add_row("steps", str(summary["steps"]))
    table.add_row("loop", f"{summary['wall_s']:.0f} s")
    table.add_row("tokens generated", f"{summary['generated_tokens']:,}")
    table.add_row("tokens kept", f"{summary['kept_tokens']:,}")
    table.add_row("tokens past a stop", f"{summary['overshoot_tokens']:,}")
    rollouts = summary["rollouts_per_step"]
    first, last = (summary[f"truncated_rollouts_{end}_step"] for end in ("first", "last"))
    table.add_row("stopped in flight, first step", f"{first} of {rollouts}")
    table.add_row("stopped in flight, last step", f"{last} of {rollouts}")
    for phase, share in summary["share"].items():
        table.add_row(f"time in {phase.replace('_', ' ')}", f"{share:.1%}")
    return table


def warning_lines(summary: dict[str, Any]) -> list[str]:
    """The run's warnings as a person reads them, one a kind, none if there were none."""
    return [
        f"warning at {about['steps']} of {summary['steps']} steps "
        f"({about['first_step']} to {about['last_step']}): {about['message']}"
        for about in summary.get("warnings", {}).values()
    ]


def draw(folder: Path, summary: dict[str, Any]) -> Path:
    """report.png: accuracy by step, overlap by position, rollout lengths, where the time went."""
    steps, evals, _ = _records(folder)
    profiles = read_lines(folder / PROFILES_FILE)
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    _accuracy(axes[0, 0], evals, summary)
    _overlap(axes[0, 1], profiles)
    _lengths(axes[1, 0], profiles)
    _time(axes[1, 1], steps)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    path = folder / "report.png"
    figure.savefig(path, dpi=110)
    return path


def _accuracy(axis: Axes, evals: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    axis.set(title="Exact match on held-out problems", xlabel="step", ylabel="accuracy")
    axis.set_ylim(-0.02, 1.05)
    axis.plot([e["step"] for e in evals], [e["accuracy"] for e in evals], "o-", color=LAST)
    for record in evals[:1] + evals[-1:]:
        axis.annotate(
            f"{record['accuracy']:.0%}",
            (record["step"], record["accuracy"]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
        )
    if "teacher_accuracy" in summary:
        axis.axhline(summary["teacher_accuracy"], color="#888888", linestyle="--", linewidth=1)
        axis.text(0, summary["teacher_accuracy"] - 0.06, "teacher", color="#666666")


def _overlap(axis: Axes, profiles: list[dict[str, Any]]) -> None:
    axis.set(
        title="Overlap of student and teacher top-k, by position",
        xlabel="response token",
        ylabel="overlap",
        ylim=(0, 1.05),
    )
    if not profiles:  # killed before its first step was written down whole
        return
    for profile, color, name in ((profiles[0], FIRST, "first"), (profiles[-1], LAST, "last")):
        if profile["overlap_by_band"] is None:
            axis.text(0.5, 0.5, "no student top-k was sent", transform=axis.transAxes, ha="center")
            return
        enough = MIN_BAND_SHARE * len(profile["lengths"])
        num_bands = sum(count >= enough for count in profile["rollouts_by_band"])
        middles = (np.arange(num_bands) + 0.5) * profile["band_tokens"]
        overlaps = profile["overlap_by_band"][:num_bands]
        axis.plot(middles, overlaps, ".-", color=color, label=f"{name} step")
    axis.legend(frameon=False, loc="lower left")


def _lengths(axis: Axes, profiles: list[dict[str, Any]]) -> None:
    axis.set(title="Rollout lengths and truncation points", xlabel="step", ylabel="tokens")
    ended: list[tuple[int, int]] = []
    stopped: list[tuple[int, int]] = []
    for profile in profiles:
        for length, finish in zip(profile["lengths"], profile["finish"], strict=True):
            (stopped if finish == "truncated" else ended).append((profile["step"], length))
    for points, color, name in ((ended, LAST, "ran to its end"), (stopped, "#c44e52", "stopped")):
        if points:
            steps, lengths = zip(*points, strict=True)
            jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(steps))
            axis.plot(np.array(steps) + jitter, lengths, ".", ms=2.5, color=color, label=name)
    axis.set_ylim(bottom=0)
    if profiles:
        axis.legend(frameon=False, markerscale=4, loc="lower right")


def _time(axis: Axes, steps: list[dict[str, Any]]) -> None:
    axis.set(title="Where the time went", xlabel="step", ylabel="seconds")
    numbers = [s["step"] for s in steps]
    values = [[s[f"seconds_{phase}"] for s in steps] for phase in PHASES]
    axis.stackplot(
        numbers,
        values,
        labels=[phase.replace("_", " ") for phase in PHASES],
        colors=[COLORS[phase] for phase in PHASES],
    )
    axis.set_ylim(0, 1.25 * max(sum(step) for step in zip(*values, strict=True)))
    axis.legend(frameon=False, loc="upper right", ncols=4, columnspacing=1.2)


def _records(folder: Path) -> tuple[list[dict[str, Any]], ...]:
    """Steps, evaluations and warnings."""
    path = folder / METRICS_FILE
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in NEEDED}
    for number, record in enumerate(read_lines(path), start=1):
        kind = record.get("kind")
        if kind not in NEEDED:
            raise DatasetError(f"{path}:{number}: kind must be one of {sorted(NEEDED)}, is {kind}")
        if missing := [name for name in NEEDED[kind] if name not in record]:
            raise DatasetError(f"{path}:{number}: kind {kind} lacks {', '.join(missing)}")
        kinds[kind].append(record)
    if not kinds["step"]:
        raise DatasetError(f"{path}: no step was finished")
    return kinds["step"], kinds["eval"], kinds["warning"]
