"""Response-length budgets: how many tokens the next step's rollouts may have. No torch.

A budget reads the effective lengths of a step's rollouts and sets `max_tokens` for the next step;
it never touches a rollout in flight. Its state belongs in the checkpoint: the released Prune-OPD
code does not save it, so that a resumed run starts again at the initial length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np


class LengthBudget(Protocol):
    """What the loop needs of a budget."""

    @property
    def max_tokens(self) -> int:
        """Response tokens a rollout of the coming step may have."""

    def update(self, effective_lengths: Sequence[int]) -> float | None:
        """Account for a finished step, given E of every rollout in it.

        Returns the share of rollouts whose E reached the boundary; None without a boundary."""

    def state(self) -> dict[str, int]:
        """What a resumed run needs; plain integers."""

    def load(self, state: Mapping[str, int]) -> None:
        """Raises ValueError on keys or values that this budget could not have written."""


def _check_rollouts(effective_lengths: Sequence[int]) -> None:
    if len(effective_lengths) == 0:
        raise ValueError("a step without rollouts says nothing about the budget")


def _read_state(state: Mapping[str, int], ranges: Mapping[str, tuple[int, int]]) -> list[int]:
    """The values in the order of `ranges`, each an int within its inclusive range."""
    if set(state) != set(ranges):
        raise ValueError(f"expected state keys {sorted(ranges)}, got {sorted(state)}")
    for name, (low, high) in ranges.items():
        if not low <= state[name] <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {state[name]}")
    return [int(state[name]) for name in ranges]


def _check_bounds(minimum: int, initial: int, maximum: int) -> None:
    if not 1 <= minimum <= initial <= maximum:
        raise ValueError(
            f"expected 1 <= minimum <= initial <= maximum, got {minimum}, {initial}, {maximum}"
        )


class FixedBudget:
    """The same length every step."""

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.max_tokens = max_tokens

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
    least `hit_share` hits, M grows by `step` at once; after `patience` steps in a row without, it
    shrinks by `step`. Short correct answers count as misses, as published.

    The boundary is M - margin in the paper and max(minimum, M - margin) in the released code: they
    differ for M < minimum + margin, where the code asks for E = M at M = minimum. The paper states
    three different initial lengths (1024, 2048 and 6144), so `initial` has no default.
    """

    def __init__(
        self,
        *,
        initial: int,
        minimum: int = 1024,
        maximum: int = 12288,
        step: int = 100,
        margin: int = 100,
        hit_share: float = 0.1,
        patience: int = 3,
        boundary: Literal["paper", "code"] = "code",
    ) -> None:
        _check_bounds(minimum, initial, maximum)
        if step < 1 or margin < 0 or patience < 1:
            raise ValueError(
                "expected step >= 1, margin >= 0 and patience >= 1, "
                f"got {step}, {margin}, {patience}"
            )
        if not 0.0 < hit_share <= 1.0:
            raise ValueError(f"hit_share must be in (0, 1], got {hit_share}")
        if boundary not in ("paper", "code"):
            raise ValueError(f"boundary must be paper or code, got {boundary!r}")
        self.max_tokens = initial
        self._num_low = 0
        self._minimum, self._maximum = minimum, maximum
        self._step, self._margin = step, margin
        self._hit_share, self._patience = hit_share, patience
        self._floor = minimum if boundary == "code" else 0

    @property
    def boundary(self) -> int:
        """Effective length from which a rollout of the present step hits."""
        return max(self._floor, self.max_tokens - self._margin)

    def update(self, effective_lengths: Sequence[int]) -> float | None:
        _check_rollouts(effective_lengths)
        num_hits = sum(length >= self.boundary for length in effective_lengths)
        hit_share = num_hits / len(effective_lengths)
        self._num_low = 0 if hit_share >= self._hit_share else self._num_low + 1
        if self._num_low == 0:
            self.max_tokens = min(self.max_tokens + self._step, self._maximum)
        elif self._num_low >= self._patience:
            self.max_tokens = max(self.max_tokens - self._step, self._minimum)
            self._num_low = 0
        return hit_share

    def state(self) -> dict[str, int]:
        return {"max_tokens": self.max_tokens, "num_low": self._num_low}

    def load(self, state: Mapping[str, int]) -> None:
        ranges = {
            "max_tokens": (self._minimum, self._maximum),
            "num_low": (0, self._patience - 1),
        }
        self.max_tokens, self._num_low = _read_state(state, ranges)


class ProgressiveBudget:
    """At step k min(maximum, initial + increment * floor(k / every)), whatever the rollouts did.

    arXiv 2605.31490 (TOPD/POPD), the baseline that any speed claim of a controller must beat.
    """

    def __init__(self, *, initial: int, maximum: int, increment: int, every: int) -> None:
        _check_bounds(1, initial, maximum)
        if increment < 0 or every < 1:
            raise ValueError(f"expected increment >= 0 and every >= 1, got {increment}, {every}")
        self._initial, self._maximum = initial, maximum
        self._increment, self._every = increment, every
        self._num_updates = 0

    @property
    def max_tokens(self) -> int:
        grown = self._initial + self._increment * (self._num_updates // self._every)
        return min(self._maximum, grown)

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

    def __init__(
        self,
        *,
        initial: int,
        minimum: int,
        maximum: int,
        margin: int = 100,
        quantile: float = 0.9,
        rate: float = 0.5,
    ) -> None:
        _check_bounds(minimum, initial, maximum)
        if margin < 0:
            raise ValueError(f"margin must be >= 0, got {margin}")
        for name, value in (("quantile", quantile), ("rate", rate)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        self.max_tokens = initial
        self._minimum, self._maximum, self._margin = minimum, maximum, margin
        self._quantile, self._rate = quantile, rate

    def update(self, effective_lengths: Sequence[int]) -> float | None:
        _check_rollouts(effective_lengths)
        target = float(np.quantile(effective_lengths, self._quantile)) + self._margin
        moved = math.ceil(self.max_tokens + self._rate * (target - self.max_tokens))
        self.max_tokens = min(max(moved, self._minimum), self._maximum)
        return None

    def state(self) -> dict[str, int]:
        return {"max_tokens": self.max_tokens}

    def load(self, state: Mapping[str, int]) -> None:
        (self.max_tokens,) = _read_state(state, {"max_tokens": (self._minimum, self._maximum)})
