"""A report as bytes: JSON, JSON by lines, or an Arrow stream. Runs beside the loop that carries the
streams, so no step of it holds the interpreter for long.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from teacher_wire.report_columns import IN_TABLE

JSON, LINES = "application/json", "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
_BLOCK = 16_384
"""Numbers that are written in one go, in about a millisecond."""
_BREATH_S = 2e-4
"""Lets the thread that waits for the interpreter have it."""


def form_of(accept: str) -> str:
    """The first of ours that an Accept header names; JSON where it names none."""
    named = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return next((form for form in named if form in (ARROW, LINES)), JSON)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """An object with arrays as JSON: float32 with as few digits as tell them apart."""
    return b"".join(_object(content))


def json_line(content: Mapping[str, Any]) -> bytes:
    """The same on a line of its own."""
    return json_bytes(content) + b"\n"


def _object(content: Mapping[str, Any]) -> Iterator[bytes]:
    yield b"{"
    for index, (name, value) in enumerate(content.items()):
        yield b"," * (index > 0) + orjson.dumps(name) + b":"
        yield from _value(value)
    yield b"}"


def _value(value: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray):
        yield from _array(value)
    elif isinstance(value, Mapping) and any(isinstance(v, np.ndarray) for v in value.values()):
        yield from _object(value)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        yield b"["
        for index, item in enumerate(value):
            yield b"," * (index > 0)
            yield from _value(item)
        yield b"]"
    else:
        yield orjson.dumps(value)


def _array(array: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """Row by row in blocks; arrays of rows are C-contiguous, which orjson needs."""
    if array.size <= _BLOCK:
        yield orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
        return
    rows = max(1, _BLOCK * len(array) // array.size)
    yield b"["
    for start in range(0, len(array), rows):
        part = orjson.dumps(array[start : start + rows], option=orjson.OPT_SERIALIZE_NUMPY)
        yield b"," * (start > 0) + part[1:-1]
        time.sleep(_BREATH_S)
    yield b"]"


def arrow_stream(
    reports: Sequence[tuple[int, Mapping[str, Any]]], head: Mapping[str, Any]
) -> bytes:
    """A table of one row a token: `rollout` is the number beside each report. What is not of a
    token stands as JSON in the schema's metadata, under `driftline`: `head`, and under `rollouts`
    each report's own.
    """
    import pyarrow as pa

    of_reports = [_not_of_tokens(report) | {"rollout": index} for index, report in reports]
    told = json.dumps({**head, "rollouts": of_reports}, default=_plain)
    tables = [_table(index, report) for index, report in reports] or [_empty()]
    table = pa.concat_tables(tables, promote_options="default")
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({"driftline": told})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def _table(index: int, report: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    ids, texts = report["response_ids"], report["texts"]
    columns = {
        "rollout": pa.array(np.full(len(ids), index, np.int32)),
        "position": pa.array(np.arange(len(ids), dtype=np.int32)),
        "token_id": pa.array(ids),
        "text": pa.array([texts.get(str(i)) for i in ids.tolist()], pa.string()),
    }
    for name, singular in IN_TABLE.items():
        values = report[name]
        if singular in columns:
            continue
        if values is None:
            columns[singular] = pa.nulls(len(ids))
        elif values.ndim == 1:
            columns[singular] = pa.array(values)
        else:
            starts = np.arange(len(ids) + 1, dtype=np.int32) * values.shape[1]
            columns[singular] = pa.ListArray.from_arrays(starts, values.ravel())
    return pa.table(columns)


def _empty() -> Any:
    import pyarrow as pa

    return pa.table({"rollout": pa.array([], pa.int32())})


def _not_of_tokens(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in IN_TABLE}


def _plain(value: Any) -> Any:
    return value.tolist()
