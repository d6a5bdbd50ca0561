"""The candidate tokens of a position that a divergence sums over, and which of them count.

Shape legend: B = sequences, T = response positions, K = teacher support, J = student top-k,
N = candidates of a support (J, K, J + 1, K + 1 or J + K). Index t is the t-th response token; nats.

A support is one or two lists of candidates side by side, each whole or the part of it that is, or
is not, in the other list. A token stands in both lists at most once as included, so that a union
counts it once. Nothing here knows ids: who fills `LossInputs` compares them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from student_trainer.settings.loss import MatchingSupport as MatchingSupport
from student_trainer.settings.loss import RewardSupport

from .inputs import Candidates, LossInputs, need


def teacher_topk(inputs: LossInputs) -> Candidates:
    """The teacher's K best tokens."""
    return need(inputs.teacher_topk, "teacher_topk")


def matching_support(inputs: LossInputs, support: MatchingSupport) -> Candidates:
    """Candidates of local support matching, [B, T, N]; behavior log-probs need not be there."""
    if support == "teacher_topk":
        return teacher_topk(inputs)
    if support == "teacher_topk_and_sampled":
        listed, name = teacher_topk(inputs), "sampled.in_teacher_topk_BTN"
        found_BT1 = need(inputs.sampled.in_teacher_topk_BTN, name)
    else:
        listed, name = need(inputs.student_topk, "student_topk"), "sampled.in_student_topk_BTN"
        found_BT1 = need(inputs.sampled.in_student_topk_BTN, name)
    return _side_by_side(listed, replace(inputs.sampled, included_BTN=~found_BT1))


def reward_support(inputs: LossInputs, support: RewardSupport) -> Candidates:
    """Candidates of a policy gradient, [B, T, N], with behavior log-probs."""
    if support == "only_tch":
        return _with_behavior(teacher_topk(inputs), "teacher_topk")
    students = _with_behavior(need(inputs.student_topk, "student_topk"), "student_topk")
    if support == "only_stu":
        return students
    if support == "intersection":
        return replace(students, included_BTN=_in_teacher_topk(students))
    teachers = _with_behavior(teacher_topk(inputs), "teacher_topk")
    found_BTK = need(teachers.in_student_topk_BTN, "teacher_topk.in_student_topk_BTN")
    teachers = replace(teachers, included_BTN=~found_BTK)
    if support == "symmetric_difference":
        students = replace(students, included_BTN=~_in_teacher_topk(students))
    return _side_by_side(students, teachers)


def _with_behavior(candidates: Candidates, name: str) -> Candidates:
    need(candidates.behavior_logprobs_BTN, f"{name}.behavior_logprobs_BTN")
    return candidates


def _in_teacher_topk(students: Candidates) -> Tensor:
    return need(students.in_teacher_topk_BTN, "student_topk.in_teacher_topk_BTN")


def _side_by_side(*lists: Candidates) -> Candidates:
    """One list, in order; behavior log-probs where every list has them."""
    behaviors = [part.behavior_logprobs_BTN for part in lists]
    present = [behavior_BTN for behavior_BTN in behaviors if behavior_BTN is not None]
    included = [
        torch.ones_like(part.teacher_logprobs_BTN, dtype=torch.bool)
        if part.included_BTN is None
        else part.included_BTN
        for part in lists
    ]
    return Candidates(
        student_logprobs_BTN=torch.cat([part.student_logprobs_BTN for part in lists], dim=-1),
        teacher_logprobs_BTN=torch.cat([part.teacher_logprobs_BTN for part in lists], dim=-1),
        behavior_logprobs_BTN=torch.cat(present, -1) if len(present) == len(lists) else None,
        included_BTN=torch.cat(included, dim=-1),
    )
