"""`student-trainer report`: a page of what runs showed, and of one run a table and some texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from run_report.page import report as page_of
from student_trainer.errors import DatasetError
from student_trainer.recording.report import (
    COMPARED_PAGE,
    REPORT_PAGE,
    draw,
    references,
    summary_table,
    text_table,
    warning_lines,
)
from student_trainer.recording.run_figures import names_of, run_figures
from student_trainer.recording.summary import summarize, write_summary
from student_trainer.recording.texts import pairs, write_side_by_side

PAIRS_WRITTEN = 10
PAIRS_SHOWN = 3
"""Of responses before and after, in a report."""


def report(
    folders: Sequence[Path], teacher_eval: Path | None, page: Path | None, pngs: Path | None
) -> int:
    """Of one run page, table and files; of several a page. `teacher_eval` is what `eval --json`
    wrote for the teacher. Raises DatasetError."""
    extra: dict[str, Any] = {}
    if teacher_eval:
        extra["teacher_accuracy"] = _teacher_accuracy(teacher_eval)
    console = Console()
    named = zip(folders, names_of(folders), strict=True)
    runs = [run_figures(f, name=name, references=references(extra)) for f, name in named]
    if len(runs) == 1:
        _report_of_one(folders[0], extra, console)
    for run in runs:
        for note in run.notes:
            console.print(f"{run.name}: {note}", style="yellow", highlight=False, markup=False)
    made = page_of(runs, " and ".join(run.name for run in runs))
    page = page or folders[0] / (REPORT_PAGE if len(runs) == 1 else COMPARED_PAGE)
    console.print(f"{made.write(page)}", highlight=False, soft_wrap=True)
    if pngs:
        made.save_charts(pngs)
        console.print(f"{pngs}", highlight=False, soft_wrap=True)
    return 0


def _report_of_one(folder: Path, extra: dict[str, Any], console: Console) -> None:
    """Table, warnings, some responses, and the files beside the page."""
    summary = summarize(folder, extra, [])
    console.print(summary_table(summary))
    for line in warning_lines(summary):
        console.print(line, style="yellow", highlight=False, markup=False)
    notes: list[str] = []
    drawn = pairs(folder, count=PAIRS_WRITTEN, notes=notes)
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False)
    if drawn:
        console.print(text_table(drawn[:PAIRS_SHOWN]))
        console.print(f"{write_side_by_side(folder, drawn)}", highlight=False)
    console.print(f"{write_summary(folder, summary)}", highlight=False)
    console.print(f"{draw(folder, summary)}", highlight=False)


def _teacher_accuracy(path: Path) -> float:
    """What `eval --json` wrote. Raises DatasetError."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["accuracy"])
    except OSError as error:
        raise DatasetError(
            f"--teacher-eval {path}: {error.strerror}; `student-trainer eval --json` writes it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: not the result of `eval --json`: {error!r}") from None
