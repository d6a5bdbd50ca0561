"""The recorded rollouts of the runs in one folder, to read and never to write.

Knows no HTTP. Nothing outside the folder is opened, whatever a name or a link says, and nothing
that leaves says where the folder is. What is still being written has another name and is not seen;
a file that is cut short is told beside what can be read.

Legend: a run is a folder, its rollouts are RUN/rollouts/step-*.parquet.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout_records import reading
from rollout_records.errors import RecordingError
from rollout_records.schema import FOLDER, METADATA_KEY, SCALARS, Origin
from rollout_records.writing import ENCODED
from teacher_server.settings import ConfigError
from teacher_wire.errors import MessageTooLargeError

MAX_RUNS = 1000
"""Runs told at once, those that were written last."""
MAX_STEPS = 500
"""Steps told at once."""
MAX_ROLLOUTS = 4096
"""Rollouts told at once."""
EXCERPT = 160
"""Characters of a prompt and a response in a list."""
MAX_FILE_BYTES = 128 * 2**20
"""Largest file that is opened, and that leaves whole."""
_RUN_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,127}")
_SUMMED_UP = ("index", "num_tokens", "mean_overlap", "verdict", "correct")


class NoRecordingError(LookupError):
    """There is no such run, step or rollout; the message says which there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """A run in the list."""

    run: str
    num_steps: int
    first_step: int
    last_step: int
    updated_at: float
    """When its last step was written; seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEntry:
    """A step in the list; None where its files do not say."""

    step: int
    num_bytes: int
    num_rollouts: int = 0
    num_tokens: int = 0
    num_truncated: int = 0
    num_correct: int | None = None
    mean_overlap: float | None = None
    """Mean of the rollouts' means."""
    problems: tuple[str, ...] = ()
    """Why some of its rollouts cannot be read."""


class RunFolder:
    """The runs of one folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError for what is no folder of runs."""
        if not folder.is_dir():
            raise ConfigError(f"runs is {str(folder)!r}, must be a folder that is there")
        if (folder / FOLDER).is_dir():
            raise ConfigError(
                f"runs is {str(folder)!r}, which is a run: name the folder that it is in"
            )
        self._root = folder.resolve()

    def runs(self) -> tuple[list[RunEntry], int]:
        """The runs with recorded rollouts, the last written first, and how many are left out."""
        found = []
        for name in sorted(folder.name for folder in self._root.iterdir()):
            if steps := self._steps(name):
                last = max(map(_written_at, steps[max(steps)]))
                found.append(
                    RunEntry(
                        run=name,
                        num_steps=len(steps),
                        first_step=min(steps),
                        last_step=max(steps),
                        updated_at=round(last, 3),
                    )
                )
        found.sort(key=lambda entry: (-entry.updated_at, entry.run))
        return found[:MAX_RUNS], max(0, len(found) - MAX_RUNS)

    def steps(self, run: str, *, before: int, limit: int) -> tuple[list[StepEntry], int]:
        """The last `limit` steps below `before`, ascending, and how many stand before those.

        Raises NoRecordingError.
        """
        steps = self._of_run(run)
        below = sorted(step for step in steps if step < before)
        shown = below[-limit:]
        return [self._step_entry(step, steps[step]) for step in shown], len(below) - len(shown)

    def origin(self, run: str) -> dict[str, Any] | None:
        """What the last readable step says of whose rollouts these are, without absolute paths."""
        steps = self._of_run(run)
        for step in sorted(steps, reverse=True)[:3]:
            for path in steps[step]:
                try:
                    return told_origin(reading.origin(path))
                except RecordingError:
                    continue
        return None

    def rollouts(self, run: str, step: int) -> tuple[list[dict[str, Any]], int, list[str]]:
        """Scalars of a step's rollouts by index, texts cut to EXCERPT characters; how many are left
        out; and what could not be read. Raises NoRecordingError."""
        rows: list[dict[str, Any]] = []
        problems = []
        for path in self._of_step(run, step):
            try:
                rows += self._table(path, SCALARS).to_pylist()
            except RecordingError as error:
                problems.append(self._said(error))
        rows.sort(key=lambda row: row["index"])
        return [_listed(row) for row in rows[:MAX_ROLLOUTS]], len(rows[MAX_ROLLOUTS:]), problems

    def rollout(self, run: str, step: int, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every column of one rollout as `rollout_records.reading` has it, and whose it is.

        Raises NoRecordingError, RecordingError.
        """
        path = self._file_of(run, step, index)
        try:
            row = reading.read_rollout([path], index)
            row["prompt_id"] = without_folder(row["prompt_id"])
            return row, told_origin(reading.origin(path))
        except RecordingError as error:
            raise RecordingError(self._said(error)) from None

    def rollout_file(self, run: str, step: int, index: int) -> bytes:
        """One rollout as a Parquet file of one row. Raises NoRecordingError, RecordingError."""
        path = self._file_of(run, step, index)
        table = self._table(path)
        return _written(table.filter(pc.equal(table["index"], index)), reading.origin(path))

    def step_file(self, run: str, step: int) -> bytes:
        """A step as one Parquet file. Raises NoRecordingError, RecordingError,
        MessageTooLargeError."""
        paths = self._of_step(run, step)
        size = sum(path.stat().st_size for path in paths)
        if size > MAX_FILE_BYTES:
            raise MessageTooLargeError(
                f"step {step} is {size} bytes, the limit is {MAX_FILE_BYTES}: copy its files"
            )
        try:
            if len(paths) > 1:
                return _written(reading.read_table(paths), reading.origin(paths[0]))
            reading.origin(paths[0])
            return paths[0].read_bytes()
        except RecordingError as error:
            raise RecordingError(self._said(error)) from None

    def _is_inside(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError):  # a link that leads to itself
            return False

    def _steps(self, run: str) -> dict[int, list[Path]]:
        """Step -> its files, without those that lead outside; empty for what is no run of ours."""
        folder = self._root / run / FOLDER
        if not _RUN_NAME.fullmatch(run) or not self._is_inside(folder):
            return {}
        found = {}
        for step, paths in reading.steps(folder).items():
            if inside := [path for path in paths if self._is_inside(path) and path.is_file()]:
                found[step] = inside
        return found

    def _of_run(self, run: str) -> dict[int, list[Path]]:
        steps = self._steps(run)
        if not steps:
            names = [entry.run for entry in self.runs()[0]]
            raise NoRecordingError(
                f"there is no run {run[:128]!r} with rollouts{_there_are(names)}"
            )
        return steps

    def _of_step(self, run: str, step: int) -> list[Path]:
        steps = self._of_run(run)
        if step not in steps:
            raise NoRecordingError(f"run {run!r} has no step {step}{_there_are(sorted(steps))}")
        return steps[step]

    def _file_of(self, run: str, step: int, index: int) -> Path:
        """The one of a step's files that has a rollout. A broken one counts only where no other has
        it."""
        there: list[int] = []
        broken = None
        for path in self._of_step(run, step):
            try:
                indices = self._table(path, ["index"])["index"].to_pylist()
            except RecordingError as error:
                broken = error
                continue
            if index in indices:
                return path
            there += indices
        if broken is not None:
            raise RecordingError(self._said(broken))
        raise NoRecordingError(
            f"step {step} of run {run!r} has no rollout {index}{_there_are(sorted(there))}"
        )

    def _table(self, path: Path, columns: Collection[str] | None = None) -> pa.Table:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise RecordingError(
                f"{path}: it has {size} bytes, the limit is {MAX_FILE_BYTES}: read it with pyarrow"
            )
        return reading.read_table([path], columns)

    def _step_entry(self, step: int, paths: Sequence[Path]) -> StepEntry:
        tables, problems = [], []
        num_bytes = 0
        for path in paths:
            try:
                status = path.stat()
                num_bytes += status.st_size
                tables.append(_summary(path, status.st_mtime_ns, status.st_size))
            except RecordingError as error:
                problems.append(self._said(error))
            except FileNotFoundError:
                continue  # thinned out meanwhile
        rows = [row for table in tables for row in table]
        overlaps = [row["mean_overlap"] for row in rows if row["mean_overlap"] is not None]
        graded = [row["correct"] for row in rows if row["correct"] is not None]
        return StepEntry(
            step=step,
            num_bytes=num_bytes,
            num_rollouts=len(rows),
            num_tokens=sum(row["num_tokens"] for row in rows),
            num_truncated=sum(row["verdict"] == "truncate" for row in rows),
            num_correct=sum(graded) if graded else None,
            mean_overlap=round(sum(overlaps) / len(overlaps), 5) if overlaps else None,
            problems=tuple(problems),
        )

    def _said(self, error: RecordingError) -> str:
        """Its words, with names as the folder has them."""
        return str(error).replace(f"{self._root}/", "")


@lru_cache(maxsize=4096)
def _summary(path: Path, mtime_ns: int, size: int) -> tuple[dict[str, Any], ...]:
    """What a list of steps needs of a file, for as long as it stays the same. Raises
    RecordingError."""
    if size > MAX_FILE_BYTES:
        raise RecordingError(f"{path}: it has {size} bytes, the limit is {MAX_FILE_BYTES}")
    return tuple(reading.read_table([path], _SUMMED_UP).to_pylist())


def _written_at(path: Path) -> float:
    """0 for a file that was taken away meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def told_origin(origin: Origin) -> dict[str, Any]:
    """Whose rollouts a file holds; of what is named by an absolute path only the last part."""
    told = asdict(origin)
    for name in ("tokenizer", "student"):
        told[name] = without_folder(told[name])
    if origin.teachers is not None:
        told["teachers"] = {tag: without_folder(name) for tag, name in origin.teachers.items()}
    return told


def without_folder(name: str | None) -> str | None:
    """A model's name; of an absolute path only what it ends with."""
    return name if name is None or not PurePath(name).is_absolute() else PurePath(name).name


def _there_are(names: Sequence[object]) -> str:
    if not names:
        return "; there is none"
    shown = ", ".join(map(str, names[:20]))
    return f"; there are {shown}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _listed(row: dict[str, Any]) -> dict[str, Any]:
    listed: dict[str, Any] = {}
    for name, value in row.items():
        if name == "prompt_id":
            value = without_folder(value)
        elif isinstance(value, float):
            value = round(value, 5) if math.isfinite(value) else None
        elif name in ("prompt", "response"):
            value = value if len(value) <= EXCERPT else value[: EXCERPT - 1] + "\u2026"
        elif name == "started_at" and value is not None:
            value = value.isoformat()
        listed[name] = value
    return listed


def _written(table: pa.Table, origin: Origin) -> bytes:
    """A file in the form of the recorded ones."""
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, table.schema, **ENCODED) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(told_origin(origin)).encode()})
    return stream.getvalue()
