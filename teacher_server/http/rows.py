"""Rows as JSON: nested lists or packed arrays, and the schema of both, from the table of columns.

Knows no column by name and no request.
"""

from __future__ import annotations

import base64
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, create_model

from teacher_wire.columns import Column, Width
from teacher_wire.errors import NonFiniteError
from teacher_wire.records import ROW_COLUMNS, LogprobDtype, ScoreRows


class ArrayEncoding(Enum):
    """How /v1/score writes arrays."""

    JSON = "json"
    """Nested lists of numbers."""
    BASE64 = "base64"
    """{dtype, shape, data}: little-endian, row-major, base64."""


class Reply(BaseModel):
    """A part of an answer; nothing else is in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PackedArray(Reply):
    """An array as base64 of its little-endian, row-major bytes."""

    dtype: str
    """numpy's name: <i4, <f2, <f4, |u1 or |b1."""
    shape: list[int]
    data: str


_NUMBERS: dict[str, type] = {"i": int, "u": int, "f": float, "b": bool}


def number_of(column: Column) -> type:
    """What one value of a column is in JSON."""
    return _NUMBERS[column.in_memory.kind]


def _array_of(column: Column) -> Any:
    row: Any = number_of(column)
    if column.width is not Width.ONE:
        row = list[row]
    present = list[row] | PackedArray
    return present | None if column.asked_by else present


_ARRAYS: dict[str, Any] = {column.name: (_array_of(column), ...) for column in ROW_COLUMNS}
RowsReply = create_model(
    "RowsReply",
    __base__=Reply,
    __doc__="teacher_wire.records.ScoreRows as JSON: row t belongs to response token t.",
    offset=(int, ...),
    count=(int, ...),
    k=(int, ...),
    **_ARRAYS,
)


def rows_to_json(rows: ScoreRows, encoding: ArrayEncoding, dtype: LogprobDtype) -> dict[str, Any]:
    """The rows as RowsReply says; `dtype` is that of packed log-probs."""
    logprobs = np.dtype("<f2" if dtype is LogprobDtype.F16 else "<f4")

    def write(array: NDArray[Any] | None, column: Column) -> Any:
        if array is None or encoding is ArrayEncoding.JSON:
            return None if array is None else array.tolist()
        element = logprobs if column.is_logprob else column.in_memory
        packed = np.ascontiguousarray(array, element)
        text = base64.b64encode(packed.tobytes()).decode("ascii")
        return {"dtype": element.str, "shape": list(packed.shape), "data": text}

    columns = zip(ROW_COLUMNS, ROW_COLUMNS.arrays(rows), strict=True)
    return {
        "offset": rows.offset,
        "count": len(rows),
        "k": rows.topk_ids.shape[1],
        **{column.name: write(array, column) for column, array in columns},
    }


def refuse_non_finite(rows: ScoreRows) -> None:
    """Raises NonFiniteError naming the array and position of the first NaN or infinity."""
    for column, array in zip(ROW_COLUMNS, ROW_COLUMNS.arrays(rows), strict=True):
        if array is None or not column.is_float:
            continue
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            position = rows.offset + int(bad[0][0])
            raise NonFiniteError(f"{column.name} is not finite at response token {position}")
