"""What a bad event is: one record a metric, with its constants and its rule (2605.07804).

A metric is stated here, in the contract (teacher.proto) and in the trainer's settings, by one name.
Pure numpy; knows no session, no state and no message.

Legend: n = rows, K = the teacher's top-k, C = candidates (the student's own top-k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_wire.errors import InvalidRequestError

MAX_DRIFT_K = 255
"""Overlap counts travel as one byte."""
MIN_SHARE = 1e-9
"""Smallest threshold, nucleus and loss of reliability."""
ROUNDING = 1e-9
"""Slack, relative, for a product or quotient of two doubles that is an integer on paper."""
_ROW_BLOCK = 256
"""Rows compared at a time, which bounds the memory of an append."""


class Rows(Protocol):
    """What a metric may look at besides the tokens; teacher_wire.records.ModelRows is one."""

    @property
    def topk_ids(self) -> NDArray[np.int32]:
        """[n, K] most likely first."""

    @property
    def topk_logprobs(self) -> NDArray[np.float32]:
        """[n, K]"""

    @property
    def candidate_logprobs(self) -> NDArray[np.float32] | None:
        """[n, C]"""


def check_share(name: str, value: float) -> None:
    """Raises InvalidRequestError unless MIN_SHARE <= value <= 1."""
    if not MIN_SHARE <= value <= 1.0:
        raise InvalidRequestError(f"drift {name} is {value}, must be in [{MIN_SHARE}, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftMetric:
    """What counts as a bad event at one position; every constant but k is a share."""

    name: ClassVar[str]
    compares_candidates: ClassVar[bool] = False
    """Whether it needs at least k candidates with every token."""

    k: int = 16
    """Leading entries of student and teacher that are looked at, at most MAX_DRIFT_K."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_DRIFT_K:
            raise InvalidRequestError(f"drift k is {self.k}, must be in 1..{MAX_DRIFT_K}")
        for field in fields(self):
            if field.name != "k":
                check_share(field.name, getattr(self, field.name))

    def bad_events(
        self, token_ids: NDArray[np.int32], rows: Rows, overlaps: NDArray[np.uint8] | None
    ) -> NDArray[np.bool_]:
        """[n] True where a position is bad. `overlaps` counts the first k entries; None without
        candidates."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapRatio(DriftMetric):
    """Bad when |student top-k and teacher top-k in common| / k < threshold (eq. 5-7)."""

    name = "overlap_ratio"
    compares_candidates = True

    threshold: float = 0.7
    """Overlap ratio below which a position is bad (gamma in the paper)."""

    @property
    def min_count(self) -> int:
        """Smallest overlap count that is not a bad event: 12 of 16 for a threshold of 0.7."""
        return math.ceil(self.threshold * self.k * (1.0 - ROUNDING))

    def bad_events(
        self, token_ids: NDArray[np.int32], rows: Rows, overlaps: NDArray[np.uint8] | None
    ) -> NDArray[np.bool_]:
        if overlaps is None:
            raise ValueError("overlap_ratio needs overlap counts")
        return overlaps < self.min_count


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTopPAccept(DriftMetric):
    """Bad when the sampled token lies outside the teacher's top-p nucleus (appendix A.10)."""

    name = "teacher_top_p_accept"

    top_p: float = 0.95
    """Mass of the nucleus, which lies within the first k entries of the teacher's top-k."""

    def bad_events(
        self, token_ids: NDArray[np.int32], rows: Rows, overlaps: NDArray[np.uint8] | None
    ) -> NDArray[np.bool_]:
        seen = slice(self.k)
        ids, logprobs = rows.topk_ids[:, seen], rows.topk_logprobs[:, seen]
        return outside_nucleus(token_ids, ids, logprobs, self.top_p)


METRICS: dict[str, type[DriftMetric]] = {
    metric.name: metric for metric in (OverlapRatio, TeacherTopPAccept)
}
"""By the name that they have in the contract, in settings and over HTTP."""


def overlap_counts(
    student_ids: NDArray[np.int32], teacher_ids: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """[n] sizes of the common set of two [n, k] lists of ids; order and repeats do not matter.

    The student's id becomes 2 * id, the teacher's 2 * id + 1. In sorted order an id that both have
    is a neighbouring pair that differs in the last bit alone, and is that pair once.
    """
    counts = np.empty(len(teacher_ids), np.uint8)
    k = student_ids.shape[1]
    for start in range(0, len(counts), _ROW_BLOCK):
        rows = slice(start, start + _ROW_BLOCK)
        keys = np.empty((len(counts[rows]), 2 * k), np.uint32)
        keys[:, :k], keys[:, k:] = student_ids[rows], teacher_ids[rows]
        keys <<= 1
        keys[:, k:] |= 1
        keys.sort(axis=1)
        is_pair = (keys[:, 1:] ^ keys[:, :-1]) == 1
        np.add.reduce(is_pair, axis=1, out=counts[rows])
    return counts


def slow_overlap_counts(
    student_ids: NDArray[np.int32], teacher_ids: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """The definition of overlap_counts, written out."""
    counts = [
        len(set(student.tolist()) & set(teacher.tolist()))
        for student, teacher in zip(student_ids, teacher_ids, strict=True)
    ]
    return np.array(counts, np.uint8)


def outside_nucleus(
    token_ids: NDArray[np.int32],
    topk_ids: NDArray[np.int32],
    topk_logprobs: NDArray[np.float32],
    top_p: float,
) -> NDArray[np.bool_]:
    """[n] True where the token is not in the nucleus of the teacher's sorted top-k.

    The nucleus is the smallest prefix whose cumulative mass is >= top_p; the whole top-k when its
    mass never gets there. An entry is in it while the mass before it is still below top_p.
    """
    mass = np.cumsum(np.exp(topk_logprobs.astype(np.float64)), axis=1)
    in_nucleus = np.ones(topk_ids.shape, np.bool_)
    in_nucleus[:, 1:] = mass[:, :-1] < top_p
    accepted: NDArray[np.bool_] = ((topk_ids == token_ids[:, None]) & in_nucleus).any(axis=1)
    return ~accepted


def slow_outside_nucleus(
    token_ids: NDArray[np.int32],
    topk_ids: NDArray[np.int32],
    topk_logprobs: NDArray[np.float32],
    top_p: float,
) -> NDArray[np.bool_]:
    """The definition of outside_nucleus, written out."""
    outside = []
    for token, ids, logprobs in zip(token_ids, topk_ids, topk_logprobs, strict=True):
        nucleus, mass = set(), 0.0
        for candidate, logprob in zip(ids, logprobs, strict=True):
            nucleus.add(int(candidate))
            mass += math.exp(float(logprob))
            if mass >= top_p:
                break
        outside.append(int(token) not in nucleus)
    return np.array(outside, np.bool_)
