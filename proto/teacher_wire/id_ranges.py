"""Token ids as ranges [start, end), ascending and disjoint: which ids take no part.

A whole tail of a vocabulary is one range, so that the usual case is a few bytes. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from teacher_wire.errors import InvalidRequestError

IdRanges: TypeAlias = tuple[tuple[int, int], ...]
MAX_RANGES = 1024


def check_ranges(ranges: IdRanges) -> None:
    """Raises InvalidRequestError for ranges that are empty, not ascending, overlapping, or many."""
    if len(ranges) > MAX_RANGES:
        raise InvalidRequestError(
            f"excluded_ids has {len(ranges)} ranges, the limit is {MAX_RANGES}"
        )
    for start, end in ranges:
        if not 0 <= start < end:
            raise InvalidRequestError(
                f"excluded_ids has the range {start}..{end}, must have 0 <= start < end"
            )
    for (_, end), (start, _) in pairwise(ranges):
        if start < end:
            raise InvalidRequestError(
                f"excluded_ids has a range from {start} on behind one up to {end}: must be "
                "ascending and disjoint"
            )


def united(*parts: IdRanges) -> IdRanges:
    """The ids that are in any of the parts, in as few ranges as can be."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(span for part in parts for span in part):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def ranges_of(ids: Iterable[int]) -> IdRanges:
    """These ids, in as few ranges as can be."""
    return united(tuple((token_id, token_id + 1) for token_id in ids))


def within(ranges: IdRanges, start: int, end: int) -> IdRanges:
    """The part of the ranges that lies in [start, end), counted from start."""
    return tuple(
        (max(first, start) - start, min(last, end) - start)
        for first, last in ranges
        if max(first, start) < min(last, end)
    )


def num_ids(ranges: IdRanges) -> int:
    """How many ids they hold."""
    return sum(end - start for start, end in ranges)


def fill(rows: Any, ranges: IdRanges, value: float) -> None:
    """In place, of an array or tensor [..., V]: what stands at the ids of the ranges. Those beyond
    V are passed over."""
    for start, end in ranges:
        rows[..., start:end] = value


def inside(ranges: IdRanges, ids: NDArray[np.int32] | Collection[int]) -> NDArray[np.bool_]:
    """Of each id, of any shape, whether a range holds it."""
    bounds = np.asarray(ranges, np.int64).reshape(-1)
    places = np.searchsorted(bounds, np.asarray(ids, np.int64), side="right")
    found: NDArray[np.bool_] = places % 2 == 1
    return found
