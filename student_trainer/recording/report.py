"""What a run showed, for a person: report.png and a table, from the files that it wrote. The page
is `run_report`'s."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from run_report.drawing import overview
from run_report.figures import RunFigures
from run_report.run_charts import run_charts
from student_trainer.recording.run_figures import run_figures
from student_trainer.recording.texts import Pair

REPORT_PICTURE, REPORT_PAGE, COMPARED_PAGE = "report.png", "report.html", "compared.html"
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


OVERVIEW = (
    *("accuracy", "overlap-first-last", "heldout", "length-cloud", "time", "overlap-heldout"),
    *("overlap-by-position", "ends", "loss", "reverse-kl"),
)
NUM_SHOWN = 6
"""Pictures of report.png: the first of these that a run has."""


def draw(folder: Path, summary: dict[str, Any]) -> Path:
    """report.png: the pictures of the page that say most, in one file."""
    return save_overview(run_figures(folder, references=references(summary)), folder)


def save_overview(run: RunFigures, folder: Path) -> Path:
    """The same of a run that is read already."""
    charts = {chart.name: chart for chart in run_charts([run])}
    shown = [charts[name] for name in OVERVIEW if name in charts][:NUM_SHOWN]
    return overview(shown or [*charts.values()], folder / REPORT_PICTURE)


def references(summary: dict[str, Any]) -> dict[str, float]:
    """What a figure is to be seen against."""
    teacher = summary.get("teacher_accuracy")
    return {} if teacher is None else {"accuracy": teacher}
