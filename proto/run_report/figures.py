"""What a report is made from: the figures of a run, as whoever has them hands them over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Values = Mapping[str, float]
TokenPieces = Callable[[Sequence[int]], list[tuple[int, str]]]
"""Token ids to pieces of text, each with how many ids it is of; together they are all ids."""


MIN_BAND_SHARE = 0.1
"""A position band is shown when at least this share of the rollouts reaches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """Overlap by position: means of bands of so many tokens."""

    width: int
    overlap: Sequence[float]
    rollouts: Sequence[int]
    """That reach each band."""
    of: int
    """Rollouts in all."""

    def shown(self) -> NDArray[np.float64]:
        """Of the bands that enough rollouts reach, from the first on."""
        enough = [count >= MIN_BAND_SHARE * self.of for count in self.rollouts]
        upto = enough.index(False) if False in enough else len(enough)
        return np.array(self.overlap[:upto], np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Of a step what is not a scalar."""

    lengths: Sequence[int]
    """Tokens kept of every rollout; the two below likewise."""
    generated: Sequence[int]
    finish: Sequence[str]
    bands: Bands | None = None
    """None without the student's top-k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """One kind of warning of a run."""

    kind: str
    first_step: int
    last_step: int
    steps: int
    """At how many steps."""
    message: str
    """The last one: what is wrong, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """One run. A figure that a step does not have is not in its values."""

    name: str
    about: Sequence[tuple[str, str]] = ()
    """What it was made of and when, for a table."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Dotted name -> value, as text."""
    groups: Callable[[str], str] = lambda name: ""
    """The group of a figure by its name."""
    group_order: Sequence[str] = ()
    steps: Mapping[int, Values] = field(default_factory=dict)
    """By step, those that learnt."""
    evaluations: Mapping[int, Values] = field(default_factory=dict)
    profiles: Mapping[int, Profile] = field(default_factory=dict)
    heldout: Mapping[int, Bands] = field(default_factory=dict)
    """Of the responses to held-out problems, by step."""
    budgets: Mapping[int, int] = field(default_factory=dict)
    """Most tokens that a rollout of a step might have, where it is known."""
    references: Mapping[str, float] = field(default_factory=dict)
    """What a figure is to be seen against: the teacher's accuracy, say."""
    warnings: Sequence[Warned] = ()
    rollouts: pa.Table | None = None
    """Recorded ones, in the schema of rollout_records, of as many steps as are to be looked at."""
    pieces: TokenPieces | None = None
    notes: Sequence[str] = ()
    """What is missing of the run, and why: a report of a part says so."""

    def series(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of a figure of the steps; both empty where there is none."""
        return _series(self.steps, name)

    def evaluated(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The same of the evaluations."""
        return _series(self.evaluations, name)

    def names(self) -> Iterator[tuple[str, str]]:
        """Every figure there is, with `step` or `eval`, in the order in which they come up."""
        for kind, found in (("step", self.steps), ("eval", self.evaluations)):
            yield from (
                (kind, name) for name in dict.fromkeys(n for v in found.values() for n in v)
            )


def _series(
    values: Mapping[int, Values], name: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    there = [(step, found[name]) for step, found in sorted(values.items()) if name in found]
    steps = np.array([step for step, _ in there], np.int64)
    return steps, np.array([value for _, value in there], np.float64)
