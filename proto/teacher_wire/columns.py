"""What a per-position column is: its element, its width, and what asks for it.

The table itself is the annotations of the records that hold the arrays (`records.ModelRows` and
`records.ScoreRows`), so that a column is stated once. Whoever carries, checks, cuts, joins or shows
rows goes through `columns_of`; nobody lists the columns a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cached_property
from operator import attrgetter
from typing import Any, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray


class Width(IntEnum):
    """How many values a row has; the index into what somebody keeps by width."""

    ONE = 0
    TOP_K = 1
    CANDIDATES = 2


LOGPROB = "logprob"
"""Element of a column that is float32 in memory and as ScoreOptions.logprob_dtype says outside."""
CANDIDATE_IDS, POLICY = "candidate_ids", "policy"
"""What asks for a column besides an option: candidates with the tokens, a drift policy."""


@dataclass(frozen=True)
class Column:
    """One array of rows, [n] or [n, width]."""

    element: str
    """numpy's name of the element, or LOGPROB."""
    width: Width = Width.ONE
    asked_by: str = ""
    """CANDIDATE_IDS, POLICY, or a flag of ScoreOptions; empty: every row has it."""
    singular: str = ""
    """What one value is called in a report for people; needed where a flag asks."""
    name: str = ""
    """That of the field."""

    @cached_property
    def is_logprob(self) -> bool:
        return self.element == LOGPROB

    @cached_property
    def is_extra(self) -> bool:
        """Whether a flag of ScoreOptions asks for it."""
        return self.asked_by not in ("", CANDIDATE_IDS, POLICY)

    @cached_property
    def is_float(self) -> bool:
        """Whether it may hold what is not finite; an integer cannot."""
        return self.in_memory.kind == "f"

    @cached_property
    def in_memory(self) -> np.dtype[Any]:
        return np.dtype("<f4" if self.is_logprob else self.element)

    def on_wire(self, logprobs: np.dtype[Any]) -> np.dtype[Any]:
        """The element in a message; a flag is a byte, 0 or 1."""
        if self.is_logprob:
            return logprobs
        return np.dtype("u1") if self.in_memory == np.bool_ else self.in_memory


class Table:
    """The columns of one record, in the order of its fields."""

    def __init__(self, columns: Iterable[Column]) -> None:
        self.columns = tuple(columns)
        self.names = tuple(column.name for column in self.columns)
        self.extras = tuple(column for column in self.columns if column.is_extra)
        """Those that a flag of ScoreOptions asks for."""
        self.arrays: Callable[[Any], tuple[NDArray[Any] | None, ...]] = attrgetter(*self.names)
        """The arrays of a record, in this order; None for one that was not asked for."""

    def __iter__(self) -> Iterator[Column]:
        return iter(self.columns)

    def by_name(self, rows: Any) -> dict[str, Any]:
        """The arrays of a record, as the arguments that make another of the same columns."""
        return dict(zip(self.names, self.arrays(rows), strict=True))

    def typed(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """The arrays with the elements that they have in a record."""
        return {
            column.name: arrays[column.name].astype(column.in_memory, copy=False)
            for column in self.columns
            if column.name in arrays
        }

    def cut(self, rows: Any, where: slice) -> dict[str, Any]:
        """As by_name, of some of the rows, as views."""
        return {
            name: None if array is None else array[where]
            for name, array in self.by_name(rows).items()
        }

    def joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        """As by_name, of the rows of all parts, of which there is at least one."""
        columns = zip(self.names, zip(*map(self.arrays, parts), strict=True), strict=True)
        return {
            name: None if arrays[0] is None else np.concatenate(arrays) for name, arrays in columns
        }


def columns_of(record: type) -> Table:
    """The fields of a dataclass that are annotated with a Column."""
    hints = get_type_hints(record, include_extras=True)
    return Table(
        replace(part, name=field.name)
        for field in fields(record)
        for part in get_args(hints[field.name])
        if isinstance(part, Column)
    )
