"""The candidate tokens of a position that a divergence sums over, and which of them count.

Shape legend: B = sequences, T = response positions, K = teacher support, J = student top-k,
N = candidates of a support (J, K, J + 1, K + 1 or J + K). Index t is the t-th response token; nats.

A support is one or two lists of candidates side by side, each whole or the part of it that is, or
is not, in the other list. A token stands in both lists at most once as included, so that a union
counts it once. Nothing here knows ids: who fills `LossInputs` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .inputs import LossInputs, need

MatchingSupport = Literal["teacher_topk", "student_topk_and_sampled", "teacher_topk_and_sampled"]
"""V1, V2 and V3 of arXiv 2603.25562, appendix G.3."""

RewardSupport = Literal["only_stu", "only_tch", "intersection", "union", "symmetric_difference"]
"""The names of thunlp/OPD and Prune-OPD; its union-intersection is `symmetric_difference`."""


@dataclass(frozen=True, kw_only=True)
class CandidateList:
    """Names of the fields of `LossInputs` that say what three policies think of one list."""

    student: str
    behavior: str
    teacher: str
    membership: str | None = None
    """A flag for each candidate; None where every candidate is included."""
    member: bool = True
    """The value of the flag where a candidate is included."""


@dataclass(frozen=True)
class Support:
    """Lists of candidates side by side; every method returns [B, T, N] in the same order."""

    lists: tuple[CandidateList, ...]

    def student(self, inputs: LossInputs) -> Tensor:
        """Log-probs of the student being trained, with gradient."""
        return _side_by_side(inputs, [part.student for part in self.lists])

    def behavior(self, inputs: LossInputs) -> Tensor:
        """Log-probs of the policy that sampled, or of the learner before its first update."""
        return _side_by_side(inputs, [part.behavior for part in self.lists])

    def teacher(self, inputs: LossInputs) -> Tensor:
        """Log-probs of the teacher."""
        return _side_by_side(inputs, [part.teacher for part in self.lists])

    def included(self, inputs: LossInputs) -> Tensor | None:
        """bool, True for candidates in the support; None where all are."""
        if all(part.membership is None for part in self.lists):
            return None
        flags = []
        for part in self.lists:
            if part.membership is None:
                flags.append(torch.ones_like(_wide(inputs, part.teacher), dtype=torch.bool))
            else:
                flag = _wide(inputs, part.membership)
                flags.append(flag if part.member else ~flag)
        return torch.cat(flags, dim=-1)


def _wide(inputs: LossInputs, name: str) -> Tensor:
    """[B, T, N], a field of the sampled token as a list of one. Raises ValueError if absent."""
    tensor = need(getattr(inputs, name), name)
    return tensor.unsqueeze(-1) if tensor.ndim == 2 else tensor


def _side_by_side(inputs: LossInputs, names: list[str]) -> Tensor:
    return torch.cat([_wide(inputs, name) for name in names], dim=-1)


TEACHER_TOPK = CandidateList(
    student="student_logprobs_at_teacher_topk_BTK",
    behavior="behavior_logprobs_at_teacher_topk_BTK",
    teacher="teacher_topk_logprobs_BTK",
)
STUDENT_TOPK = CandidateList(
    student="student_logprobs_at_student_topk_BTJ",
    behavior="behavior_topk_logprobs_BTJ",
    teacher="teacher_logprobs_at_student_topk_BTJ",
)
SAMPLED = CandidateList(
    student="student_logprobs_BT", behavior="behavior_logprobs_BT", teacher="teacher_logprobs_BT"
)
_STUDENT_IN_TEACHER = replace(STUDENT_TOPK, membership="student_topk_in_teacher_topk_BTJ")
_STUDENT_ONLY = replace(_STUDENT_IN_TEACHER, member=False)
_TEACHER_ONLY = replace(TEACHER_TOPK, membership="teacher_topk_in_student_topk_BTK", member=False)

MATCHING_SUPPORTS: dict[MatchingSupport, Support] = {
    "teacher_topk": Support((TEACHER_TOPK,)),
    "student_topk_and_sampled": Support(
        (STUDENT_TOPK, replace(SAMPLED, membership="sampled_in_student_topk_BT", member=False))
    ),
    "teacher_topk_and_sampled": Support(
        (TEACHER_TOPK, replace(SAMPLED, membership="sampled_in_teacher_topk_BT", member=False))
    ),
}
REWARD_SUPPORTS: dict[RewardSupport, Support] = {
    "only_stu": Support((STUDENT_TOPK,)),
    "only_tch": Support((TEACHER_TOPK,)),
    "intersection": Support((_STUDENT_IN_TEACHER,)),
    "union": Support((STUDENT_TOPK, _TEACHER_ONLY)),
    "symmetric_difference": Support((_STUDENT_ONLY, _TEACHER_ONLY)),
}
