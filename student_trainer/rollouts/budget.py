"""Response-length budgets: how many tokens the next step's rollouts may have. No torch.

A budget reads the effective lengths of a step's rollouts and sets `max_tokens` for the next step;
it never touches a rollout in flight. Its constants and their ranges are stated in
`settings.budget`. Its state belongs in the checkpoint: the released Prune-OPD code does not save
it, so that a resumed run starts again at the initial length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from student_trainer.settings import budget as settings


class LengthBudget(Protocol):
    """What the loop needs of a budget."""

    @property
    def max_tokens(self) -> int:
        """Response tokens a rollout of the coming step may have."""

    def update(self, effective_lengths: Sequence[int]) -> float | None:
        """Account for a finished step, given E of every rollout in it, with the turns before its
        last reliable token, which the budget holds too. Of a step that says nothing of lengths
        none are given.

        Returns the share of rollouts whose E reached the boundary; None without a boundary."""

    def state(self) -> dict[str, int]:
        """What a resumed run needs; plain integers."""

    def load(self, state: Mapping[str, int]) -> None:
        """Raises ValueError on keys or values that this budget could not have written."""


def _read_state(state: Mapping[str, int], ranges: Mapping[str, tuple[int, int]]) -> list[int]:
    """The values in the order of `ranges`, each an int within its inclusive range."""
    if set(state) != set(ranges):
        raise ValueError(f"expected state keys {sorted(ranges)}, got {sorted(state)}")
    for name, (low, high) in ranges.items():
        if not low <= state[name] <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {state[name]}")
    return [int(state[name]) for name in ranges]


class FixedBudget:
    """The same length every step."""

    def __init__(self, constants: settings.FixedBudgetSettings) -> None:
        self.max_tokens = constants.max_tokens

    def update(self, effective_lengths: Sequence[int]) -> float | None:
        """Nothing to learn."""
        return None

    def state(self) -> dict[str, int]:
        return {}

    def load(self, state: Mapping[str, int]) -> None:
        _read_state(state, {})


class PruneBudget:
    """Prune-OPD's controller (arXiv 2605.07804, section 3.3 and algorithm 1).

    A rollout hits if its E reaches a boundary just below the present length M. If a share of at
    least `hit_ratio` hits, M grows by `increment` at once; after `patience` steps in a row without,
    it shrinks by `increment`. Short correct answers count as misses, as published.

    The boundary is M - margin in the paper and max(minimum, M - margin) in the released code: they
    differ for M < minimum + margin, where the code asks for E = M at M = minimum. The paper states
    three different initial lengths (1024, 2048 and 6144).
    """

    def __init__(self, constants: settings.PruneBudgetSettings) -> None:
        self._constants = constants
        self.max_tokens = constants.initial
        self._num_low = 0

    @property
    def boundary(self) -> int:
        """Effective length from which a rollout of the present step hits."""
        floor = self._constants.minimum if self._constants.boundary == "code" else 0
        return max(floor, self.max_tokens - self._constants.margin)

    def update(self, effective_lengths: Sequence[int]) -> float | None:
        if not effective_lengths:
            return None
        constants = self._constants
        num_hits = sum(length >= self.boundary for length in effective_lengths)
        hit_share = num_hits / len(effective_lengths)
        self._num_low = 0 if hit_share >= constants.hit_ratio else self._num_low + 1
        if self._num_low == 0:
            self.max_tokens = min(self.max_tokens + constants.increment, constants.maximum)
        elif self._num_low >= constants.patience:
            self.max_tokens = max(self.max_tokens - constants.increment, constants.minimum)
            self._num_low = 0
        return hit_share

    def state(self) -> dict[str, int]:
        return {"max_tokens": self.max_tokens, "num_low": self._num_low}

    def load(self, state: Mapping[str, int]) -> None:
        ranges = {
            "max_tokens": (self._constants.minimum, self._constants.maximum),
            "num_low": (0, self._constants.patience - 1),
        }
        self.max_tokens, self._num_low = _read_state(state, ranges)


class ProgressiveBudget:
    """At step k min(maximum, initial + increment * floor(k / every_steps)), whatever rollouts did.

    arXiv 2605.31490 (TOPD/POPD), the baseline that any speed claim of a controller must beat.
    """

    def __init__(self, constants: settings.ProgressiveBudgetSettings) -> None:
        self._constants = constants
        self._num_updates = 0

    @property
    def max_tokens(self) -> int:
        num_increments = self._num_updates // self._constants.every_steps
        grown = self._constants.initial + self._constants.increment * num_increments
        return min(self._constants.maximum, grown)

    def update(self, effective_lengths: Sequence[int]) -> float | None:
        self._num_updates += 1
        return None

    def state(self) -> dict[str, int]:
        return {"num_updates": self._num_updates}

    def load(self, state: Mapping[str, int]) -> None:
        (self._num_updates,) = _read_state(state, {"num_updates": (0, 2**63 - 1)})


class QuantileBudget:
    """M moves by the share `rate` towards quantile(E) + margin, rounded up; unpublished.

    Ours, to replace Prune-OPD's +-100 tokens a step, which needs 100 steps to double 10 000 tokens.
    A fixed point exists below `maximum` when the quantile stops growing with M.
    """

    def __init__(self, constants: settings.QuantileBudgetSettings) -> None:
        self._constants = constants
        self.max_tokens = constants.initial

    def update(self, effective_lengths: Sequence[int]) -> float | None:
        if not effective_lengths:
            return None
        constants = self._constants
        target = float(np.quantile(effective_lengths, constants.quantile)) + constants.margin
        moved = math.ceil(self.max_tokens + constants.rate * (target - self.max_tokens))
        self.max_tokens = min(max(moved, constants.minimum), constants.maximum)
        return None

    def state(self) -> dict[str, int]:
        return {"max_tokens": self.max_tokens}

    def load(self, state: Mapping[str, int]) -> None:
        bounds = (self._constants.minimum, self._constants.maximum)
        (self.max_tokens,) = _read_state(state, {"max_tokens": bounds})
