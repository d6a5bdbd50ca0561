"""A run's folder as a report is made from: all that it has, and what it has not is told of.

A run that is still being written, and one that was killed in the middle of a line or a file, has a
report of what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout_records.errors import RecordingError
from rollout_records.reading import origin, read_table, steps
from rollout_records.schema import FOLDER
from run_report.figures import Bands, Profile, RunFigures, TokenPieces, Warned
from run_report.token_pieces import pieces_of
from student_trainer.diagnostics.groups import GROUPS, group_of
from student_trainer.diagnostics.step_report import StepProfile
from student_trainer.recording.json_lines import (
    PROFILES_FILE,
    WrittenRun,
    read_profiles,
    read_run,
)
from student_trainer.recording.run_folder import CONFIG_FILE, read_record
from student_trainer.recording.summary import by_kind, told

NEWEST_STEPS = 8
"""Whose recorded rollouts are looked at."""
MAX_BYTES = 64_000_000
"""Of their files, which are read whole."""


def run_figures(
    folder: Path, *, name: str = "", references: Mapping[str, float] | None = None
) -> RunFigures:
    """All of a run. Raises DatasetError for a folder that is none, or a file that is broken but at
    its end."""
    notes: list[str] = []
    written = read_run(folder, notes)
    profiles = _profiles(folder, notes)
    rollouts, pieces = _rollouts(folder / FOLDER, notes)
    settings = _settings(folder, notes)
    said = told(folder, notes)
    if said.get("finished") is False:
        notes.append(_unfinished(written.steps_done, said.get("steps_planned")))
    return RunFigures(
        name=name or folder.resolve().name,
        about=_about(folder, settings),
        settings=settings,
        groups=group_of,
        group_order=tuple(GROUPS),
        steps={report.step: report.values() for report in written.steps},
        evaluations={report.step: report.values() for report in written.evaluations},
        profiles={step: _profile(profile) for step, profile in profiles.items()},
        heldout=_heldout(written),
        budgets=_budgets(written, settings),
        references=references or {},
        warnings=_warnings(written),
        rollouts=rollouts,
        pieces=pieces,
        notes=notes,
    )


def _unfinished(done: int, planned: int | None) -> str:
    if not planned:
        return f"{done} steps are written: the run goes on, or was ended before its last one."
    if done < planned:
        return (
            f"{done} of {planned} steps are written: the run goes on, or was ended before its last "
            "one."
        )
    return (
        f"All {planned} steps are written, but not that the run is finished: its last evaluation "
        "or the trained student is not there yet, or it was ended before."
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """What tells runs apart: the names of their folders, with as much of the path as that takes."""
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts[-1:])} ({number})" for number, parts in enumerate(paths, 1)]


def _profiles(folder: Path, notes: list[str]) -> dict[int, StepProfile]:
    if not (folder / PROFILES_FILE).is_file():
        notes.append(f"{PROFILES_FILE} is not there: no lengths, and nothing by position.")
        return {}
    return read_profiles(folder, notes)


def _profile(profile: StepProfile) -> Profile:
    return Profile(
        lengths=profile.lengths,
        generated=profile.generated,
        finish=profile.finish,
        bands=_bands(
            profile.band_tokens,
            profile.overlap_by_band,
            profile.rollouts_by_band,
            len(profile.lengths),
        ),
    )


def _bands(
    width: int | None,
    overlap: Sequence[float] | None,
    rollouts: Sequence[int] | None,
    of: int,
) -> Bands | None:
    """None where a part of it is not known."""
    if not width or not overlap or not rollouts:
        return None
    return Bands(width=width, overlap=overlap, rollouts=rollouts, of=of)


def _heldout(written: WrittenRun) -> dict[int, Bands]:
    found = {
        report.step: _bands(h.band_tokens, h.overlap_by_band, h.responses_by_band, h.responses)
        for report in written.evaluations
        if (h := report.heldout) is not None
    }
    return {step: bands for step, bands in found.items() if bands is not None}


def _warnings(written: WrittenRun) -> list[Warned]:
    return [
        Warned(
            kind=kind,
            first_step=about["first_step"],
            last_step=about["last_step"],
            steps=about["steps"],
            message=about["message"],
        )
        for kind, about in by_kind(written.alarms).items()
    ]


def _budgets(written: WrittenRun, settings: Mapping[str, str]) -> dict[int, int]:
    """A step reports the budget of the next one; that of the first is a setting."""
    reported = {r.step: r.max_tokens for r in written.steps if r.max_tokens is not None}
    first = settings.get("budget.initial") or settings.get("budget.max_tokens")
    budgets = {step + 1: tokens for step, tokens in reported.items()}
    if first is not None:
        budgets.setdefault(1, int(first))
    known = {report.step for report in written.steps}
    return {step: tokens for step, tokens in sorted(budgets.items()) if step in known}


def _rollouts(folder: Path, notes: list[str]) -> tuple[pa.Table | None, TokenPieces | None]:
    """Those of the newest steps, and how their ids read."""
    tables: list[pa.Table] = []
    num_bytes, pieces = 0, None
    for step, paths in sorted(steps(folder).items(), reverse=True)[:NEWEST_STEPS]:
        num_bytes += sum(path.stat().st_size for path in paths if path.exists())
        if tables and num_bytes > MAX_BYTES:
            break
        try:
            tables.append(read_table(paths))
            tokenizer = origin(paths[0]).tokenizer
        except RecordingError as error:
            notes.append(f"The recorded rollouts of step {step} are left out: {error}.")
            continue
        if pieces is None and tokenizer is not None:
            pieces = pieces_of(Path(tokenizer))
    return (pa.concat_tables(tables[::-1]) if tables else None), pieces


def _settings(folder: Path, notes: list[str]) -> dict[str, str]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{CONFIG_FILE} is not whole: {error}.")
        return {}
    return dict(_leaves(tree)) if isinstance(tree, dict) else {}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _about(folder: Path, settings: Mapping[str, str]) -> list[tuple[str, str]]:
    starts = read_record(folder).get("starts", [])
    found = [("student", settings.get("student.model")), ("loss", settings.get("loss.kind"))]
    if starts:
        last, teacher = starts[-1], starts[-1].get("teacher", {})
        versions = last.get("versions", {})
        found += [
            ("teacher", " ".join(filter(None, (teacher.get("model_id"), teacher.get("dtype"))))),
            ("teacher's weights", teacher.get("weights_digest")),
            ("began", starts[0].get("began")),
            ("ended", last.get("ended")),
            ("outcome", last.get("outcome")),
            ("starts", str(len(starts)) if len(starts) > 1 else None),
            ("commit", last.get("git_commit")),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]
    return [(label, str(value)) for label, value in found if value]
