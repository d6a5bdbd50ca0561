"""metrics.jsonl and profiles.jsonl: written a line at a time, and read back as the same records.

A line of metrics.jsonl is a step, an evaluation or a warning, of profiles.jsonl what of a step is
not a scalar. Each is flushed at once, so a killed run loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from student_trainer.diagnostics.alarms import Alarm
from student_trainer.diagnostics.step_report import EvalReport, StepProfile, StepReport
from student_trainer.errors import DatasetError
from student_trainer.process.writing import write_whole

METRICS_FILE = "metrics.jsonl"
PROFILES_FILE = "profiles.jsonl"
SAMPLES_FOLDER = "samples"
"""Of texts, which `texts` writes; its lines too have a step."""


class JsonLines:
    """A sink of both files."""

    def __init__(self, folder: Path, *, append: bool) -> None:
        mode = "a" if append else "w"
        self._metrics = (folder / METRICS_FILE).open(mode, encoding="utf-8")
        self._profiles = (folder / PROFILES_FILE).open(mode, encoding="utf-8")

    def step(self, report: StepReport) -> None:
        self._write(report.kind, report.step, report.values())
        if report.profile is not None:
            line = {"step": report.step, **asdict(report.profile)}
            self._profiles.write(json.dumps(line) + "\n")
            self._profiles.flush()

    def evaluation(self, report: EvalReport) -> None:
        self._write("eval", report.step, report.written())

    def alarm(self, step: int, alarm: Alarm) -> None:
        self._write("warning", step, {"warning": alarm.kind, "message": alarm.message})

    def close(self) -> None:
        self._metrics.close()
        self._profiles.close()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._metrics.flush()


@dataclass(slots=True, kw_only=True)
class WrittenRun:
    """All that metrics.jsonl holds, in order."""

    steps: list[StepReport] = field(default_factory=list)
    """Without profiles, which are in the other file."""
    skipped: list[StepReport] = field(default_factory=list)
    evaluations: list[EvalReport] = field(default_factory=list)
    alarms: list[tuple[int, Alarm]] = field(default_factory=list)

    @property
    def steps_done(self) -> int:
        """The last step that was finished, learnt from or skipped."""
        return max((report.step for report in (*self.steps, *self.skipped)), default=0)


KINDS = ("step", "skipped", "eval", "warning")


def read_run(folder: Path, notes: list[str] | None = None) -> WrittenRun:
    """The reports of a run. Raises DatasetError naming the file, the line and what is wrong.

    With `notes` a last line that is not whole, of a run that is being written or was killed, is
    left out and told of there.
    """
    path = folder / METRICS_FILE
    run = WrittenRun()
    for number, values in enumerate(read_lines(path, notes), start=1):
        kind, step = values.get("kind"), values["step"]
        try:
            if kind == "step":
                run.steps.append(StepReport.from_values(step, values))
            elif kind == "skipped":
                run.skipped.append(StepReport.skipped_from_values(step, values))
            elif kind == "eval":
                run.evaluations.append(EvalReport.from_values(step, values))
            elif kind == "warning":
                alarm = Alarm(kind=values["warning"], message=values["message"])
                run.alarms.append((step, alarm))
            else:
                raise DatasetError(f"{path}:{number}: kind must be one of {KINDS}, is {kind}")
        except KeyError as missing:
            raise DatasetError(f"{path}:{number}: kind {kind} lacks {missing.args[0]}") from None
    return run


def read_profiles(folder: Path, notes: list[str] | None = None) -> dict[int, StepProfile]:
    """Profiles by step. Raises DatasetError likewise."""
    path = folder / PROFILES_FILE
    profiles = {}
    for number, values in enumerate(read_lines(path, notes), start=1):
        try:
            step = values.pop("step")
            profiles[step] = StepProfile(**values)
        except TypeError as error:
            raise DatasetError(f"{path}:{number}: no profile of a step: {error}") from None
    return profiles


def read_lines(path: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The records of a JSON-lines file. Raises DatasetError naming the file and the line; of a last
    line without an end only where there are no `notes` to tell of it."""
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; is {path.parent} a run?")
    found = []
    with path.open(encoding="utf-8", errors="strict" if notes is None else "replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found.append(_record(f"{path}:{number}", line))
            except DatasetError:
                if notes is None or line.endswith("\n"):
                    raise
                notes.append(f"The last line of {path.name} is not whole, and left out.")
    return found


def drop_later(folder: Path, step: int) -> None:
    """Keeps what was written up to a step; a killed run may have left the last line incomplete."""
    texts = sorted((folder / SAMPLES_FOLDER).glob("*.jsonl"))
    for path in (folder / METRICS_FILE, folder / PROFILES_FILE, *texts):
        kept = []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n") or _record(f"{path}:{number}", line)["step"] > step:
                break
            kept.append(line)
        write_whole(path, "".join(kept))


def _record(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON, cut short perhaps: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DatasetError(f"{where}: must be an object with `step`")
    return record
