"""One record a stage: Prompt -> Rollout -> Batch. Numpy until the learner, torch from Batch on.

Legend: p = prompt tokens, T = response tokens kept, K = teacher top-k, J = student top-k.

Alignment: index t is response token t; every log-prob at t is given the prompt and tokens before t.
All rows of a Rollout end at the same T: tokens past a truncation are dropped and only counted.
Where others speak between the student's answers, their tokens are response tokens too, but not
sampled ones: no mask holds them, and no count does.

Worked example: a response of 40 tokens was generated, the verdict kept 25 of them. Then T = 25,
num_generated = 40, finish is TRUNCATED, and the overshoot is 15.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teacher_wire.id_ranges import IdRanges
from teacher_wire.records import DriftState, ScoreRows

if TYPE_CHECKING:
    from torch import Tensor


class Finish(Enum):
    """Why a rollout ended."""

    STOP = "stop"
    """The student ended it."""
    LENGTH = "length"
    """The token budget of the step was used up."""
    TRUNCATED = "truncated"
    """The drift policy stopped it in flight."""
    UNSCORED = "unscored"
    """The teacher stayed away; what it had scored is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem."""

    prompt_id: str
    text: str
    token_ids: NDArray[np.int32]
    """[p]"""
    answer: str | None
    """What the graded part of a response must equal."""
    teacher: str | None = None
    """Which of several teachers scores it; None for the one without a name."""
    teacher_token_ids: NDArray[np.int32] | None = None
    """[p'] what the teacher is given instead of `token_ids`; None: the same."""
    turns: tuple[NDArray[np.int32], ...] = ()
    """What is said to the student after its first answer, its second, ...: each begins with what
    ends an answer and ends where the next one begins."""

    @property
    def teacher_prompt_ids(self) -> NDArray[np.int32]:
        """What the teacher is given before the response."""
        return self.token_ids if self.teacher_token_ids is None else self.teacher_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the behavior policy samples."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_topk: int = 0
    """The student's own top-k returned with every token; 0 for none."""
    seed: int | None = None
    excluded_ids: IdRanges = ()
    """Ids that are never said: they take no part in the distribution. Those that the model has no
    logit for are passed over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a sampler hands out at once: m new tokens of one rollout."""

    token_ids: NDArray[np.int32]
    """[m]"""
    logprobs: NDArray[np.float32]
    """[m] under the distribution that sampled them."""
    topk_ids: NDArray[np.int32]
    """[m, J] most likely first."""
    topk_logprobs: NDArray[np.float32]
    """[m, J]"""
    finish: Finish | None
    """Set on the last delta."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTimes:
    """Monotonic seconds at which things happened, and what the verdict cost."""

    started_s: float
    generated_s: float
    """Generation had ended."""
    scored_s: float
    """The last score had arrived."""
    round_trip_tokens: int
    """Tokens generated between sending the deciding append and its verdict; 0 if not truncated."""
    verdict_span_tokens: int
    """Tokens in the deciding append; 0 if not truncated."""
    started_at: float | None = None
    """Seconds since 1970 at `started_s`, by the clock of the process that generated it; None where
    nobody looked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A response, how it was sampled, and what the teacher says of each of its tokens."""

    prompt: Prompt
    response_ids: NDArray[np.int32]
    """[T]"""
    behavior_logprobs: NDArray[np.float32]
    """[T] of the policy that sampled."""
    student_topk_ids: NDArray[np.int32]
    """[T, J]"""
    student_topk_logprobs: NDArray[np.float32]
    """[T, J] of the policy that sampled."""
    mask: NDArray[np.bool_]
    """[T] False for special tokens that must not count, and for what others said."""
    teacher: ScoreRows
    """T rows, offset 0."""
    drift: DriftState | None
    finish: Finish
    num_generated: int
    """Tokens that were sampled, overshoot included."""
    policy_version: int
    """Number of optimiser steps of the weights that sampled."""
    times: RolloutTimes
    behavior_logprobs_at_teacher_topk: NDArray[np.float32] | None = None
    """[T, K] of the learner before its first update; None unless recomputed."""
    loss_weight: float = 1.0
    """What its tokens count in the loss; that of its teacher."""
    sampled: NDArray[np.bool_] | None = None
    """[T] False for what others said; None: all of it is the student's."""

    def __len__(self) -> int:
        return len(self.response_ids)

    def of_student(self, array: NDArray[Any]) -> NDArray[Any]:
        """Of an array with a row a response token, the rows of those that the student sampled."""
        return array if self.sampled is None else array[self.sampled]

    @property
    def num_sampled(self) -> int:
        """Response tokens that the student sampled."""
        return len(self.of_student(self.response_ids))

    @property
    def last_answer_ids(self) -> NDArray[np.int32]:
        """What the student said last."""
        return last_answer_ids(self.response_ids, self.sampled)

    @property
    def overshoot_tokens(self) -> int:
        """Tokens generated past the point where the drift policy stopped the rollout."""
        return self.num_generated - self.num_sampled


def last_answer_ids(
    response_ids: NDArray[np.int32], sampled: NDArray[np.bool_] | None
) -> NDArray[np.int32]:
    """What of a response the student said last; `sampled` as in Rollout."""
    if sampled is None or sampled.all():
        return response_ids
    return response_ids[np.flatnonzero(~sampled)[-1] + 1 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How the learner's weights are written for a sampler."""

    dtype: str | None = None
    """Of the parameters, such as "bfloat16"; None leaves them as the learner has them."""
    as_saved: bool = False
    """Under the names and in the layout of a saved checkpoint, not those in memory: experts one by
    one, for instance, that transformers holds fused."""
    adapter_alone: bool = False
    """The matrices of an adapter, by peft's names, for a sampler that has its base."""
    device: str = "cpu"
    """Where they are handed out, such as "cuda:0"."""
    is_announced: bool = False
    """Whether the receiver has to know which tensors will come before the first one does."""


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor that will come."""

    name: str
    dtype: str
    """Such as "bfloat16"."""
    shape: tuple[int, ...]
    num_bytes: int


class Announced(Iterator[tuple[str, "Tensor"]]):
    """Weights to be read once, of which it is known beforehand what they are."""

    def __init__(
        self, weights: Iterator[tuple[str, Tensor]], tensors: Sequence[WrittenTensor]
    ) -> None:
        """`tensors`: those of `weights`, in their order."""
        self._weights = weights
        self.tensors = tensors

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._weights)


AS_LEARNT = WeightFormat()
"""As the learner has them; a tied head once, as the embedding."""
