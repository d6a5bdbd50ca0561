"""avg@n and pass@k from n samples a problem, some of which may not have been graded."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

Grades = Sequence[Sequence[bool | None]]
"""[problems][samples]; None for what could not be graded."""


def share_right(grades: Sequence[bool | None]) -> float | None:
    """Of those that were graded; None for none."""
    graded = [grade for grade in grades if grade is not None]
    return sum(graded) / len(graded) if graded else None


def average(grades: Grades) -> float | None:
    """avg@n: mean over problems of the share of their samples that are right."""
    return _mean([share_right(samples) for samples in grades])


def mean_pass_at_k(grades: Grades, k: int) -> float | None:
    """Mean over problems of the chance that one of k samples is right; a problem with fewer than k
    graded samples says nothing of it."""
    graded = [[grade for grade in samples if grade is not None] for samples in grades]
    return _mean([pass_at_k(len(g), sum(g), k) for g in graded if len(g) >= k])


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that k of the samples hold a right one (Chen et al. 2021, eq. 1)."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples with {num_correct} correct")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
