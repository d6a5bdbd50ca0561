"""Rows of JSON text: a line each, or one list; plain or gzip. What is wrong is named by line."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from student_trainer.errors import DatasetError

SUFFIXES = (".jsonl", ".ndjson", ".json")
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""How files of wider encodings begin; UTF-32 in little-endian order begins as UTF-16 does."""


class WrittenNumber(float):
    """A number with a point or an exponent that remembers how it was written: 1.50, not 1.5."""

    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number


def is_json(path: Path) -> bool:
    """Whether a file is read as JSON, by its name."""
    return (
        path.with_suffix("").suffix in SUFFIXES
        if path.suffix == ".gz"
        else (path.suffix in SUFFIXES)
    )


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and what stands there. Raises DatasetError naming file and line."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as lines:
        try:
            first = next(iter(lines), b"").removeprefix(codecs.BOM_UTF8)
            if first.startswith(WIDE_MARKS):
                raise DatasetError(f"{path}:1: not UTF-8 but UTF-16 or UTF-32; convert the file")
            if first.lstrip().startswith(b"["):
                yield from _listed(path, first + lines.read())
                return
            yield from _line(path, 1, first)
            for number, line in enumerate(lines, start=2):
                yield from _line(path, number, line)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DatasetError(f"{path}: not a whole gzip file: {error}") from None


def _line(path: Path, number: int, line: bytes) -> Iterator[tuple[str, Any]]:
    where = f"{path}:{number}"
    if line.strip():
        yield where, parsed(where, _decoded(path, number, line))


def _listed(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    text = "".join(
        _decoded(path, number, line)
        for number, line in enumerate(content.splitlines(keepends=True), start=1)
    )
    for index, row in enumerate(parsed(str(path), text)):
        yield f"{path}[{index}]", row


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}:{number}: byte {line[error.start]:#04x} at {error.start + 1} of the line is "
            "not UTF-8; convert the file, as with `iconv -f latin1 -t utf-8`"
        ) from None


def parsed(where: str, text: str) -> Any:
    """What JSON text says. Raises DatasetError, also for NaN, which JSON does not have."""

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is none of its values; what is missing is null")

    try:
        return json.loads(text, parse_float=WrittenNumber, parse_constant=refused)
    except RecursionError:
        raise DatasetError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise DatasetError(f"{where}: not JSON: {error}") from None
