"""The columns that take the whole distribution of a row to know, by their definitions.

The engines that are right rather than fast use these; `row_scores` has a fast form of each, and
tests hold one against the other. Each is written so that numpy and torch both carry it out.

Legend: n = rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

LOWEST = -1e30
"""Stands for the log of a probability of 0, times which it must be 0."""


class Distribution(NamedTuple):
    """Rows over the whole vocabulary; arrays or tensors."""

    logits_nV: Any
    """Of any base and temperature: only their order counts."""
    logprobs_nV: Any
    probs_nV: Any
    token_logits_n1: Any
    """Of the actual tokens."""


def entropies(rows: Distribution) -> Any:
    """[n] -sum_v p(v) log p(v), in nats."""
    return -(rows.probs_nV * rows.logprobs_nV.clip(min=LOWEST)).sum(-1)


def token_ranks(rows: Distribution) -> Any:
    """[n] 1 + how many tokens are likelier than the actual one."""
    return 1 + (rows.logits_nV > rows.token_logits_n1).sum(-1)


DEFINITIONS: dict[str, Callable[[Distribution], Any]] = {
    function.__name__: function for function in (entropies, token_ranks)
}
"""By column."""
