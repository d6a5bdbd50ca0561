"""Where rows come from: a file, a folder of files, or a data set by folder or name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.data.files import SUFFIXES, is_json, json_rows
from student_trainer.data.tables import PARQUET, SAVED_AS, dataset_rows, parquet_rows
from student_trainer.errors import DatasetError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set."""

    path: Path
    """A file, a folder, or a name that the package `datasets` knows."""
    subset: str | None = None
    """Of a data set by name."""
    split: str = "train"
    """Of a data set by name, or of a folder that holds several."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where each row stands, for messages, and its fields.

        Raises DatasetError naming the file, the row and what is wrong with it.
        """
        try:
            for where, row in self._read():
                if not isinstance(row, dict):
                    raise DatasetError(f"{where}: must be an object, is {type(row).__name__}")
                yield where, row
        except OSError as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _read(self) -> Iterator[tuple[str, Any]]:
        path = self.path
        if path.is_file():
            yield from _file_rows(path)
        elif path.is_dir() and not any((path / name).is_file() for name in SAVED_AS):
            files = sorted(file for file in path.iterdir() if _is_known(file))
            if not files:
                raise DatasetError(
                    f"{path}: the folder holds no {', '.join((*SUFFIXES, PARQUET))} file, and was "
                    "not written by save_to_disk"
                )
            for file in files:
                yield from _file_rows(file)
        elif path.is_dir() or _is_name(path):
            yield from dataset_rows(str(path), subset=self.subset, split=self.split)
        else:
            raise DatasetError(
                f"{path}: no such dataset; docs/data.md says how to get or write one"
            )


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == PARQUET:
        return parquet_rows(path)
    return json_rows(path)


def _is_known(path: Path) -> bool:
    return path.is_file() and (path.suffix == PARQUET or is_json(path))


def _is_name(path: Path) -> bool:
    """Whether it may be the name of a data set on the hub: `name` or `owner/name`."""
    return not path.is_absolute() and len(path.parts) <= 2 and not _looks_like_a_file(path)


def _looks_like_a_file(path: Path) -> bool:
    return path.suffix in (*SUFFIXES, PARQUET, ".gz") or path.parts[0] in (".", "..")
