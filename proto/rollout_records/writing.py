"""Recorded rollouts written: whole or not at all, small, and within a number of bytes.

A file has its name once it is complete: a process that is killed leaves at most a `.partial` file,
which nobody reads and the next writer takes away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rollout_records.reading import STEP_FILE, steps
from rollout_records.schema import (
    COLUMNS,
    METADATA_KEY,
    SCHEMA,
    Column,
    Origin,
    Shape,
    file_name,
)

GROUP_TOKENS = 1 << 16
"""Tokens of a row group: what is read to show one rollout of a step with many."""
ZSTD_LEVEL = 9
PARTIAL = ".partial"
Row = Mapping[str, Any]
"""Column -> value, as `reading.read_rollout` gives it; what is not there is null."""


def table_of(rows: Sequence[Row]) -> pa.Table:
    """The rows as the schema has them. Raises ValueError naming a column that must be there."""
    columns = [_cells(column, [row.get(column.name) for row in rows]) for column in COLUMNS]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def write_table(path: Path, table: pa.Table, origin: Origin) -> None:
    """Replaces a file in one go; its folder is made. Raises OSError."""
    told = json.dumps(asdict(origin)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with pq.ParquetWriter(partial, table.schema, **ENCODED) as writer:
            for group in _groups(table):
                writer.write_table(group, row_group_size=max(1, len(group)))
            writer.add_key_value_metadata({METADATA_KEY: told})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_step(folder: Path, step: int, rank: int, rows: Sequence[Row], origin: Origin) -> Path:
    """The rollouts of a step that one process learnt from, in its folder. Raises OSError."""
    path = folder / file_name(step, rank)
    write_table(path, table_of(rows), origin)
    return path


def drop_later(folder: Path, step: int) -> None:
    """Takes away what was recorded of later steps, and what was half written."""
    for number, paths in steps(folder).items():
        for path in paths if number > step else ():
            path.unlink(missing_ok=True)
    for path in folder.glob(f"step-*{PARTIAL}"):
        path.unlink(missing_ok=True)


def thin_out(folder: Path, max_bytes: int, rank: int = 0) -> list[int]:
    """Takes away steps that this process wrote until its files have at most so many bytes.

    The first and the newest stay. Of the others the one goes whose neighbours are nearest to each
    other, the older of equals: so what is left is spread over the run. Returns the steps that went.
    """
    sizes = dict(_sizes(folder, rank))
    gone = []
    while sum(sizes.values()) > max_bytes and len(sizes) > 1:
        there = sorted(sizes)
        between = list(zip(there, there[1:], there[2:], strict=False))
        step = min(between, key=lambda three: three[2] - three[0])[1] if between else there[0]
        del sizes[step]
        with suppress(FileNotFoundError):
            (folder / file_name(step, rank)).unlink()
        gone.append(step)
    return gone


def _sizes(folder: Path, rank: int) -> Iterator[tuple[int, int]]:
    for path in folder.glob("step-*.parquet"):
        match = STEP_FILE.fullmatch(path.name)
        if match and int(match[2] or 0) == rank:
            with suppress(FileNotFoundError):
                yield int(match[1]), path.stat().st_size


def _groups(table: pa.Table) -> Iterator[pa.Table]:
    """Whole rows, of about GROUP_TOKENS together; at least one group."""
    start = total = 0
    for end, tokens in enumerate(table.column("num_tokens").to_pylist(), 1):
        total += tokens
        if total >= GROUP_TOKENS:
            yield table.slice(start, end - start)
            start, total = end, 0
    if start < len(table) or not len(table):
        yield table.slice(start)


def _cells(column: Column, values: Sequence[Any]) -> pa.Array:
    if column.is_required and any(value is None for value in values):
        raise ValueError(f"column {column.name} must not be null")
    if column.shape is Shape.SCALAR:
        return pa.array(values, column.type)
    missing = np.array([value is None for value in values], np.bool_)
    there = [np.asarray(value) for value in values if value is not None]
    lengths = _lengths(values)
    if column.shape is not Shape.LISTS:
        return _lists(lengths, missing, _flat(column, there), column.type)
    widths = [np.full(len(array), array.shape[1], np.int64) for array in there]
    inner_type = column.type.value_type
    width_of_each = np.concatenate(widths) if widths else np.zeros(0, np.int64)
    inner = _lists(width_of_each, None, _flat(column, [a.ravel() for a in there]), inner_type)
    return _lists(lengths, missing, inner, column.type)


def _lengths(values: Iterable[Any]) -> NDArray[np.int64]:
    return np.array([0 if value is None else len(value) for value in values], np.int64)


def _flat(column: Column, arrays: Sequence[NDArray[Any]]) -> pa.Array:
    kind = column.kind.to_pandas_dtype()
    joined = np.concatenate(arrays) if arrays else np.zeros(0, kind)
    if column.bits is not None:
        joined = rounded(joined, column.bits)
    return pa.array(np.ascontiguousarray(joined.astype(kind, copy=False)), column.kind)


def rounded(values: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """The nearest float32 with so many bits of mantissa; the others are 0."""
    mantissa, exponent = np.frexp(values.astype(np.float32))
    nearest: NDArray[np.float32] = np.ldexp(
        np.round(np.ldexp(mantissa, bits + 1)), exponent - bits - 1
    )
    return nearest


def _lists(
    lengths: NDArray[np.int64], missing: NDArray[np.bool_] | None, values: pa.Array, kind: Any
) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = None if missing is None or not missing.any() else pa.array(missing)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=mask)


def _leaf(column: Column) -> str:
    """The path of a column's values in the file."""
    depth = {Shape.SCALAR: 0, Shape.PROMPT: 1, Shape.TOKENS: 1, Shape.LISTS: 2}[column.shape]
    return ".".join([column.name, *["list.element"] * depth])


_SPLIT = [
    _leaf(c) for c in COLUMNS if c.shape is not Shape.SCALAR and (c.bits or c.kind == pa.int32())
]
_FEW = ("overlap", "reliability", "ranks")
"""Of few values: numbered, they pack better."""
_NUMBERED = [_leaf(c) for c in COLUMNS if c.shape is Shape.SCALAR or c.name in _FEW]
ENCODED: dict[str, Any] = {
    "write_page_checksum": True,
    "store_schema": False,  # Arrow's own, a third of the end of a file
    "write_statistics": [c.name for c in COLUMNS if c.shape is Shape.SCALAR],
    "compression": "zstd",
    "compression_level": ZSTD_LEVEL,
    "use_dictionary": _NUMBERED,
    # Ids and log-probs are cut into their bytes, which zstd packs best.
    "use_byte_stream_split": [leaf for leaf in _SPLIT if leaf not in _NUMBERED],
}
"""How pyarrow writes each column; measured in docs/run-folder.md."""
