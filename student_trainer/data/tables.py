"""Rows of Arrow tables: Parquet files, and data sets of the package `datasets`.

The latter need the extra `data`. Columns of JSON are read from what is stored, not as `datasets`
gives them: it makes 7 of the text 007, and a missing value of the text NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.data.files import parsed
from student_trainer.errors import DatasetError, one_line

if TYPE_CHECKING:
    import pyarrow

PARQUET = ".parquet"
SAVED_AS = ("dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` wrote: of several splits, of one."""
ROWS_AT_ONCE = 1000


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row stands, counted from 0, and its columns. Raises DatasetError."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            yield from _numbered(str(path), table.iter_batches(ROWS_AT_ONCE))
    except DatasetError:
        raise
    # Whatever pyarrow makes of a file that is none.
    except Exception as error:
        raise DatasetError(f"{path}: not a whole Parquet file: {_said(error)}") from error


def dataset_rows(name: str, *, subset: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """The same of a folder that `save_to_disk` wrote, or of a data set by its name."""
    try:
        import datasets
    except ImportError:
        raise DatasetError(_needs_extra(name)) from None
    datasets.disable_progress_bars()
    saved = Path(name).is_dir()
    try:
        if saved:
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise DatasetError(f"{name}: has no split {split!r}, has {', '.join(found)}")
                found = found[split]
        else:
            found = datasets.load_dataset(name, subset, split=split)
        where = name if saved else f"{name} ({split})"
        tables = found.with_format("arrow").iter(ROWS_AT_ONCE)
        yield from _numbered(where, tables)
    except DatasetError:
        raise
    # Whatever the package, the hub and the network make of a name.
    except Exception as error:
        advice = (
            ""
            if saved
            else (
                "; no file or folder has that name, so it was looked up on the hub: without a "
                "network, give a file, or a folder written by save_to_disk"
            )
        )
        raise DatasetError(f"{name}: cannot be loaded: {_said(error)}{advice}") from error


def _numbered(
    where: str, tables: Iterator[pyarrow.Table | pyarrow.RecordBatch]
) -> Iterator[tuple[str, Any]]:
    number = 0
    for table in tables:
        types = {field.name: field.type for field in table.schema}
        for row in table.to_pylist():
            at = f"{where}[{number}]"
            yield at, {name: _value(at, value, types[name]) for name, value in row.items()}
            number += 1


def _value(where: str, value: Any, kind: pyarrow.DataType) -> Any:
    """The value as it was stored: JSON parsed, but text and numbers within it left as text."""
    import pyarrow

    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        is_scalar = not value.lstrip().startswith(("{", "[", '"', "null"))
        return value if is_scalar else parsed(where, value)
    if pyarrow.types.is_struct(kind):
        return {name: _value(where, value[name], kind.field(name).type) for name in value}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return [_value(where, item, kind.value_type) for item in value]
    return value


def _needs_extra(name: str) -> str:
    return f"{name}: needs the packages of the extra `data`: pip install 'driftline[data]'"


def _said(error: Exception) -> str:
    return one_line(error) or type(error).__name__
