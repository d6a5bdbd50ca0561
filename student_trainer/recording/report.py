"""What a run showed, for a person: report.png and a table, from the files the run wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from student_trainer.diagnostics.step_report import (
    PHASES,
    EvalReport,
    HeldoutReport,
    StepProfile,
    StepReport,
)
from student_trainer.recording.json_lines import read_profiles, read_run
from student_trainer.recording.texts import Pair
from student_trainer.records import Finish

COLORS = {"generate": "#4878a8", "teacher_wait": "#c44e52", "learn": "#6aa66a", "sync": "#c9a227"}
FIRST, LAST = "#9aa5b1", "#1f4e79"
MIN_BAND_SHARE = 0.1
"""A position band is drawn when at least this share of the rollouts reaches it."""

SHOWN_CHARACTERS = 400


def summary_table(summary: dict[str, Any]) -> Table:
    """The summary as a person reads it."""
    table = Table(title="what the run did", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for label, values in _compared(summary):
        table.add_row(label, values)
    if "teacher_accuracy" in summary:
        table.add_row("teacher, exact match", f"{summary['teacher_accuracy']:.1%}")
    planned = summary["steps_planned"]
    table.add_row("steps", f"{summary['steps_done']}{f' of {planned}' if planned else ''}")
    if summary["finished"] is False:
        table.add_row("finished", "no: go on with --resume")
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


def _compared(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the first and the last evaluation say, where both say it."""
    for name in (key.removesuffix("_before") for key in summary if key.endswith("_before")):
        before, after = summary[f"{name}_before"], summary.get(f"{name}_after")
        if before is None or after is None or name.endswith("_se"):
            continue
        errors = [summary.get(f"{name}_se_{when}") for when in ("before", "after")]
        if match := re.fullmatch(r"(avg|pass)_at_(\d+)", name):
            label, form = f"student, {match[1]}@{match[2]}", ".1%"
        elif name == "accuracy":
            label, form = "student, right answers", ".1%"
        else:
            label = f"held out, {name.removeprefix('heldout_').replace('_', ' ')}"
            form = ".1%" if name.endswith("_rate") else ".3f"
        yield (
            label,
            f"{_with_error(before, errors[0], form)} → {_with_error(after, errors[1], form)}",
        )


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:.3f}"


def text_table(pairs: Sequence[Pair]) -> Table:
    """Some responses side by side, shortened."""
    table = Table(title="held-out responses", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    for pair in pairs:
        cells = (pair.before.prompt[-SHOWN_CHARACTERS:], pair.before.response, pair.after.response)
        table.add_row(*(Text(cell[:SHOWN_CHARACTERS]) for cell in cells))
    return table


def warning_lines(summary: dict[str, Any]) -> list[str]:
    """The run's warnings as a person reads them, one a kind, none if there were none."""
    return [
        f"warning at {about['steps']} of {summary['steps']} steps "
        f"({about['first_step']} to {about['last_step']}): {about['message']}"
        for about in summary.get("warnings", {}).values()
    ]


def draw(folder: Path, summary: dict[str, Any]) -> Path:
    """report.png: accuracy by step, overlap by position, rollout lengths, where the time went; and
    what the teacher makes of held-out responses."""
    written, profiles = read_run(folder), read_profiles(folder)
    heldout = [(e.step, e.heldout) for e in written.evaluations if e.heldout is not None]
    columns = 3 if heldout else 2
    figure = Figure(figsize=(6 * columns, 8), layout="constrained")
    axes = figure.subplots(2, columns)
    _accuracy(axes[0, 0], written.evaluations, summary)
    if heldout:
        _divergence(axes[0, 2], heldout)
        _heldout_overlap(axes[1, 2], heldout)
    _overlap(axes[0, 1], list(profiles.values()))
    _lengths(axes[1, 0], profiles)
    _time(axes[1, 1], written.steps)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    path = folder / "report.png"
    figure.savefig(path, dpi=110)
    return path


def _accuracy(axis: Axes, evals: list[EvalReport], summary: dict[str, Any]) -> None:
    axis.set(title="Right answers to held-out problems", xlabel="step", ylabel="accuracy")
    axis.set_ylim(-0.02, 1.05)
    known = [(e.step, e.accuracy) for e in evals if e.accuracy is not None]
    if not known:
        axis.text(0.5, 0.5, "no answers to compare with", transform=axis.transAxes, ha="center")
        return
    axis.plot(*zip(*known, strict=True), "o-", color=LAST)
    for (step, accuracy), offset in ((known[0], (20, -4)), (known[-1], (0, -18))):
        axis.annotate(
            f"{accuracy:.0%}",
            (step, accuracy),
            textcoords="offset points",
            xytext=offset,
            ha="center",
        )
    if "teacher_accuracy" in summary:
        axis.axhline(summary["teacher_accuracy"], color="#888888", linestyle="--", linewidth=1)
        axis.text(0, summary["teacher_accuracy"] - 0.06, "teacher", color="#666666")


def _divergence(axis: Axes, heldout: list[tuple[int, HeldoutReport]]) -> None:
    axis.set(title="Held-out divergence from the teacher", xlabel="step", ylabel="nats a token")
    for name, color in (("reverse_kl", LAST), ("forward_kl", "#6aa66a")):
        known = [
            (step, value, getattr(report, f"{name}_se") or 0.0)
            for step, report in heldout
            if (value := getattr(report, name)) is not None
        ]
        if known:
            steps, values, errors = zip(*known, strict=True)
            label = name.replace("_kl", " KL")
            axis.errorbar(steps, values, yerr=errors, fmt="o-", capsize=3, color=color, label=label)
            axis.legend(frameon=False)


def _heldout_overlap(axis: Axes, heldout: list[tuple[int, HeldoutReport]]) -> None:
    axis.set(title="Held-out overlap, by position", xlabel="response token", ylabel="overlap")
    for (step, report), color in ((heldout[0], FIRST), (heldout[-1], LAST)):
        if report.overlap_by_band and report.responses_by_band and report.band_tokens:
            enough = MIN_BAND_SHARE * report.responses
            overlaps = [
                overlap
                for overlap, count in zip(
                    report.overlap_by_band, report.responses_by_band, strict=True
                )
                if count >= enough
            ]
            middles = (np.arange(len(overlaps)) + 0.5) * report.band_tokens
            axis.plot(middles, overlaps, ".-", color=color, label=f"step {step}")
            axis.legend(frameon=False, loc="lower left")


def _overlap(axis: Axes, profiles: list[StepProfile]) -> None:
    axis.set(
        title="Overlap of student and teacher top-k, by position",
        xlabel="response token",
        ylabel="overlap",
        ylim=(0, 1.05),
    )
    lowest = 1.0
    if not profiles:  # killed before its first step was written down whole
        return
    for profile, color, name in ((profiles[0], FIRST, "first"), (profiles[-1], LAST, "last")):
        if profile.overlap_by_band is None or profile.rollouts_by_band is None:
            axis.text(0.5, 0.5, "no student top-k was sent", transform=axis.transAxes, ha="center")
            return
        enough = MIN_BAND_SHARE * len(profile.lengths)
        num_bands = sum(count >= enough for count in profile.rollouts_by_band)
        middles = (np.arange(num_bands) + 0.5) * profile.band_tokens
        overlaps = profile.overlap_by_band[:num_bands]
        axis.plot(middles, overlaps, ".-", color=color, label=f"{name} step")
        lowest = min([lowest, *overlaps])
    axis.set_ylim(max(0.0, lowest - 0.05), 1.02)
    axis.legend(frameon=False, loc="lower left")


def _lengths(axis: Axes, profiles: dict[int, StepProfile]) -> None:
    axis.set(title="Rollout lengths and truncation points", xlabel="step", ylabel="tokens")
    ended: list[tuple[int, int]] = []
    stopped: list[tuple[int, int]] = []
    for step, profile in profiles.items():
        for length, finish in zip(profile.lengths, profile.finish, strict=True):
            (stopped if finish == Finish.TRUNCATED.value else ended).append((step, length))
    for points, color, name in ((ended, LAST, "ran to its end"), (stopped, "#c44e52", "stopped")):
        if points:
            steps, lengths = zip(*points, strict=True)
            jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(steps))
            axis.plot(np.array(steps) + jitter, lengths, ".", ms=2.5, color=color, label=name)
    axis.set_ylim(bottom=0)
    if profiles:
        axis.legend(frameon=False, markerscale=4, loc="lower right")


def _time(axis: Axes, steps: list[StepReport]) -> None:
    axis.set(title="Where the time went", xlabel="step", ylabel="seconds")
    numbers = [s.step for s in steps]
    values = [[getattr(s.seconds, phase) or 0.0 for s in steps] for phase in PHASES]
    axis.stackplot(
        numbers,
        values,
        labels=[phase.replace("_", " ") for phase in PHASES],
        colors=[COLORS[phase] for phase in PHASES],
    )
    axis.set_ylim(0, 1.25 * max(sum(step) for step in zip(*values, strict=True)))
    axis.legend(frameon=False, loc="upper right", ncols=4, columnspacing=1.2)
