"""How much of a response only repeats itself.

Token t continues a loop of period p if it lies in a run of positions that each hold the token p
before, and the run is at least 2p and at least 16 tokens long: a passage and two repeats of it. The
first passage does not count, so a response that is one loop of period p has a rate of 1 - p/T.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 64
MIN_REPEATS = 2
"""Repeats of the first passage."""
MIN_RUN_TOKENS = 16
"""Shorter runs are zeros of a number, or dots."""


def repetition_rate(token_ids: NDArray[np.int32]) -> float:
    """Share of the tokens [T] that continue a loop; 0.0 for none."""
    return float(loop_mask(token_ids).mean()) if len(token_ids) else 0.0


def loop_mask(token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[T] True where a token continues a loop of any period up to MAX_PERIOD."""
    inside = np.zeros(len(token_ids), np.bool_)
    for period in range(1, min(MAX_PERIOD, len(token_ids) // (MIN_REPEATS + 1)) + 1):
        shortest = max(MIN_REPEATS * period, MIN_RUN_TOKENS)
        repeated = np.flatnonzero(token_ids[period:] == token_ids[:-period]) + period
        if len(repeated) < shortest:
            continue
        # Runs of consecutive positions: a new one starts where the step is not 1.
        starts = np.flatnonzero(np.diff(repeated, prepend=-1) != 1)
        for start, end in zip(starts, [*starts[1:], len(repeated)], strict=True):
            if end - start >= shortest:
                inside[repeated[start] : repeated[end - 1] + 1] = True
    return inside


def slow_loop_mask(token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """The definition of loop_mask, written out."""
    tokens = token_ids.tolist()
    inside = [False] * len(tokens)
    for period in range(1, MAX_PERIOD + 1):
        run: list[int] = []
        for position in range(period, len(tokens)):
            run = [*run, position] if tokens[position] == tokens[position - period] else []
            if len(run) >= MIN_REPEATS * period and len(run) >= MIN_RUN_TOKENS:
                for member in run:
                    inside[member] = True
    return np.array(inside, np.bool_)
