"""Recorded rollouts read back, whole or one by one; a file that is cut or no recording is named.

Pandas, polars and duckdb read the files without this: see docs/run-folder.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rollout_records.errors import RecordingError
from rollout_records.schema import BY_NAME, COLUMNS, METADATA_KEY, VERSION, Column, Origin, Shape

__all__ = ["RecordingError", "origin", "read_rollout", "read_table", "steps"]
STEP_FILE = re.compile(r"step-(\d+)(?:\.(\d+))?\.parquet")


def steps(folder: Path) -> dict[int, list[Path]]:
    """Step -> its files, one a process, by number; empty for a folder that is not there.

    `folder` is that of the recordings, RUN/rollouts. Files that are still being written have other
    names.
    """
    found: list[tuple[int, int, Path]] = []
    for path in folder.glob("step-*.parquet"):
        if match := STEP_FILE.fullmatch(path.name):
            found.append((int(match[1]), int(match[2] or 0), path))
    of_step: dict[int, list[Path]] = {}
    for step, _, path in sorted(found):
        of_step.setdefault(step, []).append(path)
    return of_step


def read_table(paths: Sequence[Path], columns: Collection[str] | None = None) -> pa.Table:
    """The rollouts of some files, by step and index; all `columns`, or those named.

    Raises RecordingError for a file that is cut short or is no recording, and for a column that
    there is not.
    """
    if columns is not None and (unknown := sorted(set(columns) - set(BY_NAME))):
        raise RecordingError(f"columns {', '.join(unknown)}: must be of {', '.join(BY_NAME)}")
    if not paths:
        raise RecordingError("no file was named to read rollouts from")
    wanted = None if columns is None else [*dict.fromkeys(["step", "index", *columns])]
    tables = []
    for path in paths:
        with _opened(path) as file, _named(path):
            tables.append(file.read(columns=wanted))
    table = pa.concat_tables(tables, promote_options="default")
    if len(paths) > 1:
        table = table.sort_by([("step", "ascending"), ("index", "ascending")])
    return table if columns is None else table.select(list(columns))


def read_rollout(paths: Sequence[Path], index: int) -> dict[str, Any]:
    """One rollout of a step by its index: column -> value.

    A scalar is as Python has it, [T] and [T][K] are arrays: ids and ranks int32, what is measured
    float32, flags bool. None for what is missing. Raises RecordingError, also for an index that is
    not among the recorded ones.
    """
    there: list[int] = []
    for path in paths:
        with _opened(path) as file, _named(path):
            for group in range(file.num_row_groups):
                indices = file.read_row_group(group, columns=["index"]).column(0).to_pylist()
                if index in indices:
                    row = file.read_row_group(group).slice(indices.index(index), 1)
                    return {
                        column.name: _value(column, row.column(column.name)[0])
                        for column in COLUMNS
                        if column.name in row.column_names
                    }
                there += indices
    raise RecordingError(
        f"{', '.join(str(path) for path in paths)}: rollout {index} was not recorded, of the step "
        f"there are {', '.join(map(str, sorted(there)[:20])) or 'none'}"
    )


def origin(path: Path) -> Origin:
    """Whose rollouts a file holds. Raises RecordingError."""
    with _opened(path) as file:
        said = json.loads(file.metadata.metadata[METADATA_KEY])
    return Origin(**{f.name: said.get(f.name) for f in fields(Origin)})


def _value(column: Column, cell: pa.Scalar) -> Any:
    if not cell.is_valid:
        return None
    if column.shape is Shape.SCALAR:
        return cell.as_py()
    if column.shape is Shape.LISTS:
        rows = cell.values
        flat = _array(rows.flatten())
        return flat.reshape(len(rows), -1) if len(rows) else flat.reshape(0, 0)
    return _array(cell.values)


def _array(values: pa.Array) -> NDArray[Any]:
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A file of ours. Raises RecordingError for any other."""
    with _named(path):
        # zstd alone lets most changed bytes pass as other numbers.
        file = pq.ParquetFile(path, page_checksum_verification=True)
    try:
        metadata = file.metadata.metadata or {}
        said = _said(path, metadata.get(METADATA_KEY))
        if (version := said.get("version")) is None or version > VERSION:
            raise RecordingError(
                f"{path}: rollouts recorded in version {version}, this reads up to {VERSION}"
            )
        missing = [
            c.name for c in COLUMNS if c.is_required and c.name not in file.schema_arrow.names
        ]
        if missing:
            raise RecordingError(f"{path}: it lacks the columns {', '.join(missing)}")
        yield file
    finally:
        file.close()


def _said(path: Path, text: bytes | None) -> dict[str, Any]:
    if text is None:
        raise RecordingError(
            f"{path}: no recorded rollouts: its metadata has no {METADATA_KEY.decode()!r}"
        )
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise RecordingError(f"{path}: its metadata {METADATA_KEY.decode()!r} is no JSON object")
    return said


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What Arrow says of a broken file, with its name."""
    try:
        yield
    except FileNotFoundError:
        raise RecordingError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordingError(f"{path}: cut short, or no Parquet file: {reason}") from None
