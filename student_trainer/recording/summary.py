"""summary.json: the figures of a run, and whether it is finished.

Whether it is finished only the run itself can say, so it says so: no, when it begins and when it is
stopped; yes, when the trained student is saved. A report keeps that word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from student_trainer.diagnostics.alarms import Alarm
from student_trainer.diagnostics.step_report import PHASES, StepReport
from student_trainer.errors import DatasetError
from student_trainer.process.writing import write_whole
from student_trainer.recording.json_lines import METRICS_FILE, WrittenRun, read_run

SUMMARY_FILE = "summary.json"
COMPARED = (
    *("accuracy", "avg_at", "pass_at", "heldout_reverse_kl", "heldout_forward_kl"),
    *("heldout_teacher_logprob", "heldout_student_entropy", "heldout_overlap"),
    *("heldout_length", "heldout_end_rate", "heldout_repetition_rate"),
)
"""Beginnings of the names whose first and last value a summary holds."""


def write_progress(folder: Path, *, finished: bool, steps_planned: int) -> None:
    """The run's own word, with the figures of the steps that it has finished."""
    write_summary(folder, figures(read_run(folder), finished, steps_planned))


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """summary.json in the run's folder."""
    path = folder / SUMMARY_FILE
    write_whole(path, json.dumps(summary, indent=2) + "\n")
    return path


def summarize(
    folder: Path, extra: dict[str, Any] | None = None, notes: list[str] | None = None
) -> dict[str, Any]:
    """The figures of a run; tokens are totals over all steps, shares are of the loop's wall time.

    `finished` and `steps_planned` are None for a run that never said so. `extra` is added as it is
    (a teacher's accuracy, say). Raises DatasetError when the folder holds no finished step, or a
    line of a file is broken; with `notes` a last line that is not whole is told of there.
    """
    written = read_run(folder, notes)
    if not written.steps:
        raise DatasetError(f"{folder / METRICS_FILE}: no step was finished")
    said = told(folder, notes)
    return figures(written, said.get("finished"), said.get("steps_planned")) | (extra or {})


def figures(
    written: WrittenRun, finished: bool | None, steps_planned: int | None
) -> dict[str, Any]:
    """What summary.json holds of a run that may have finished no step."""
    summary: dict[str, Any] = {
        "finished": finished,
        "steps_done": written.steps_done,
        "steps_planned": steps_planned,
        **(_of_steps(written.steps) if written.steps else {}),
        **_of_evaluations(written),
    }
    if written.alarms:
        summary["warnings"] = by_kind(written.alarms)
    return summary


def told(folder: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """What summary.json says; empty where there is none. Raises DatasetError for one that is not
    JSON; with `notes` that is told of there."""
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if notes is None:
            raise DatasetError(f"{path}: not JSON: {error}") from None
        notes.append(f"{SUMMARY_FILE} is not whole, and left out: {error}.")
        return {}
    return said if isinstance(said, dict) else {}


def _of_steps(steps: list[StepReport]) -> dict[str, Any]:
    rollouts = [step.generation for step in steps if step.generation is not None]
    seconds = {p: sum(getattr(step.seconds, p) or 0.0 for step in steps) for p in PHASES}
    wall_s = sum(seconds.values())
    gaps = [step.sync_gap_nats for step in steps if step.sync_gap_nats is not None]
    overshoot = sum(r.overshoot_tokens for r in rollouts)
    truncated = sum(r.truncated_rollouts for r in rollouts)
    figures: dict[str, Any] = {
        "steps": len(steps),
        "wall_s": round(wall_s, 2),
        "generated_tokens": sum(r.generated_tokens for r in rollouts),
        "kept_tokens": sum(r.kept_tokens for r in rollouts),
        "overshoot_tokens": overshoot,
        "truncated_rollouts": truncated,
        "truncated_rollouts_first_step": rollouts[0].truncated_rollouts,
        "truncated_rollouts_last_step": rollouts[-1].truncated_rollouts,
        "rollouts_per_step": rollouts[0].rollouts,
        "share": {phase: round(seconds[phase] / wall_s, 4) for phase in PHASES},
        "sync_gap_nats_max": max(gaps, default=None),
    }
    if truncated:
        bound = sum((r.overshoot_bound_mean or 0.0) * r.truncated_rollouts for r in rollouts)
        figures["overshoot_mean"] = round(overshoot / truncated, 2)
        figures["overshoot_bound_mean"] = round(bound / truncated, 2)
    return figures


def _of_evaluations(written: WrittenRun) -> dict[str, Any]:
    if not written.evaluations:
        return {}
    before, after = (written.evaluations[end].values() for end in (0, -1))
    names = [name for name in {**before, **after} if name.startswith(COMPARED)]
    return {
        f"{name}_{when}": values.get(name)
        for name in names
        for when, values in (("before", before), ("after", after))
    }


def by_kind(alarms: list[tuple[int, Alarm]]) -> dict[str, dict[str, Any]]:
    """Warning -> at how many steps, which were the first and last, and what it last said."""
    kinds: dict[str, dict[str, Any]] = {}
    for step, alarm in alarms:
        about = kinds.setdefault(alarm.kind, {"steps": 0, "first_step": step})
        about["steps"] += 1
        about |= {"last_step": step, "message": alarm.message}
    return kinds
