"""What one micro-batch hands to the losses: aligned tensors, checked and masked once.

Shape legend: B = sequences, T = response positions, N = candidates of a list: 1 for the sampled
token, K for the teacher's top-k, J for the student's. Index t is the t-th response token; nats;
masked positions hold 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import check_log_probs, check_mask

_PROVIDED_BY = {
    "teacher_topk": "score the rollouts with the teacher's top-K (k >= 1)",
    "student_topk": "roll out with the student's top-k and send its ids to the teacher",
    "sampled.behavior_logprobs_BTN": "roll out with the log-probs of the sampled tokens",
    "student_topk.behavior_logprobs_BTN": "roll out with the student's top-k log-probs",
    "teacher_topk.behavior_logprobs_BTN": "recompute the behavior log-probs with the learner",
    "sampled.in_teacher_topk_BTN": "compare the sampled ids with the teacher's top-k ids",
    "sampled.in_student_topk_BTN": "compare the sampled ids with the student's top-k ids",
    "student_topk.in_teacher_topk_BTN": "compare the student's top-k ids with the teacher's",
    "teacher_topk.in_student_topk_BTN": "compare the teacher's top-k ids with the student's",
    "bad_events_BT": "score the rollouts under a drift policy (overlap metric and threshold)",
    "teacher_entropies_BT": "score the rollouts with ScoreOptions.want_entropy",
    "student_entropies_BT": "gather the student's entropies with its log-probs",
    "student_log_outside_BT": "name the support: Needs(mass_outside=...)",
    "response_ids_BT": "hand over the ids of the sampled tokens",
}
_FLAGS = ("in_teacher_topk_BTN", "in_student_topk_BTN", "included_BTN")
_LISTS = ("sampled", "teacher_topk", "student_topk")

Present = TypeVar("Present")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidates:
    """One list of candidate tokens a position, and what three policies think of them; [B, T, N]."""

    student_logprobs_BTN: Tensor
    """of the student being trained, with gradient."""
    teacher_logprobs_BTN: Tensor
    behavior_logprobs_BTN: Tensor | None = None
    """of the policy that sampled, or of the learner before its first update."""
    in_teacher_topk_BTN: Tensor | None = None
    """bool, True where the candidate is one of the teacher's K; None for that list itself."""
    in_student_topk_BTN: Tensor | None = None
    """bool, True where the candidate is one of the student's J; None for that list itself."""
    included_BTN: Tensor | None = None
    """bool, True where the candidate belongs to a support (`supports`); None where all do."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossInputs:
    """One micro-batch, aligned: row t of every tensor is about response token t.

    Construction checks shapes, dtypes, gradients and that no log-prob is missing (non-finite) at a
    valid position, and writes 0.0 at masked positions, so that whatever stood there reaches neither
    loss nor gradient. Raises ValueError naming the tensor.
    """

    mask_BT: Tensor
    """bool, True where the token counts; special tokens already taken out."""
    sampled: Candidates
    """the sampled token, a list of one; its behavior log-probs are always there."""
    teacher_topk: Candidates | None = None
    """the teacher's K best tokens."""
    student_topk: Candidates | None = None
    """the J best tokens of the policy that sampled."""
    bad_events_BT: Tensor | None = None
    """bool, True where teacher and student disagree by the drift policy's measure."""
    teacher_entropies_BT: Tensor | None = None
    """nats, of the teacher's full distribution."""
    student_entropies_BT: Tensor | None = None
    """nats, of the full distribution of the student being trained; no gradient."""
    student_log_outside_BT: Tensor | None = None
    """log of the student's mass outside the support that the loss named, with gradient; -inf where
    there is no token outside."""
    response_ids_BT: Tensor | None = None
    """int64, the sampled tokens; 0 where masked, which may be a real id: look at mask_BT."""
    progress: float = 0.0
    """Share of the run's steps that are done, in [0, 1]: 0 in the first, 1 in the last."""

    @property
    def student_logprobs_BT(self) -> Tensor:
        """Of the sampled tokens under the student being trained, with gradient."""
        return self.sampled.student_logprobs_BTN.squeeze(-1)

    @property
    def teacher_logprobs_BT(self) -> Tensor:
        """Of the sampled tokens under the teacher."""
        return self.sampled.teacher_logprobs_BTN.squeeze(-1)

    @property
    def behavior_logprobs_BT(self) -> Tensor:
        """Of the sampled tokens under the policy that sampled them."""
        name = "sampled.behavior_logprobs_BTN"
        return need(self.sampled.behavior_logprobs_BTN, name).squeeze(-1)

    def __post_init__(self) -> None:
        check_mask(self.mask_BT)
        need(self.sampled.behavior_logprobs_BTN, "sampled.behavior_logprobs_BTN")
        if self.sampled.student_logprobs_BTN.shape[-1] != 1:
            raise ValueError("sampled is one token a position, a list of N = 1")
        numbers: dict[str, Tensor] = {}
        for name in _LISTS:
            candidates: Candidates | None = getattr(self, name)
            if candidates is not None:
                numbers |= _checked(name, candidates)
        for name in ("teacher_entropies_BT", "student_entropies_BT"):
            if (entropies_BT := getattr(self, name)) is not None:
                check_log_probs(2, student={}, fixed={name: entropies_BT})
                numbers[name] = entropies_BT
        if (outside_BT := self.student_log_outside_BT) is not None:
            check_log_probs(2, student={"student_log_outside_BT": outside_BT}, fixed={})
            is_none_BT = outside_BT.isneginf()
            numbers["student_log_outside_BT"] = outside_BT.masked_fill(is_none_BT, 0.0)
        for name, kind, dtype in (
            ("bad_events_BT", "bool", torch.bool),
            ("response_ids_BT", "int64", torch.long),
        ):
            if (tensor := getattr(self, name)) is not None:
                _check_type(name, tensor, kind, dtype, self.mask_BT.shape)
        self._check_complete(numbers)
        self._write_zeros()

    def _check_complete(self, numbers: dict[str, Tensor]) -> None:
        """Every number is finite at valid positions; one device synchronisation for all."""
        for name, tensor in numbers.items():
            if tensor.shape[:2] != self.mask_BT.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, "
                    f"mask_BT has shape {tuple(self.mask_BT.shape)}"
                )
        num_missing = []
        for tensor in numbers.values():
            finite = tensor.isfinite()
            finite_BT = finite if finite.ndim == 2 else finite.all(dim=-1)
            num_missing.append((~finite_BT & self.mask_BT).sum())
        for name, missing in zip(numbers, torch.stack(num_missing).tolist(), strict=True):
            if missing:
                raise ValueError(f"{name} is missing (not finite) at {missing} valid positions")

    def _write_zeros(self) -> None:
        """0.0, 0 or False at masked positions of every tensor but the mask."""
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, Candidates):
                changed: dict[str, Any] = {
                    f.name: self._masked(getattr(value, f.name)) for f in fields(value)
                }
                value = replace(value, **changed)
            elif field.name != "progress":
                value = self._masked(value)
            object.__setattr__(self, field.name, value)

    def _masked(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        keep = self.mask_BT if tensor.ndim == 2 else self.mask_BT.unsqueeze(-1)
        return torch.where(keep, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def _checked(name: str, candidates: Candidates) -> dict[str, Tensor]:
    """The log-probs of a list by their names. Raises ValueError unless they and its flags fit."""
    present = {
        f"{name}.{field.name}": tensor
        for field in fields(candidates)
        if (tensor := getattr(candidates, field.name)) is not None
    }
    flags = {k: t for k, t in present.items() if k.endswith(_FLAGS)}
    numbers = {k: t for k, t in present.items() if k not in flags}
    student, *fixed = numbers
    check_log_probs(3, student={student: numbers[student]}, fixed={k: numbers[k] for k in fixed})
    for flag, tensor in flags.items():
        _check_type(flag, tensor, "bool", torch.bool, numbers[student].shape)
    return numbers


def _check_type(
    name: str, tensor: Tensor, kind: str, dtype: torch.dtype, shape: torch.Size
) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {kind} of shape {tuple(shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def need(value: Present | None, name: str) -> Present:
    """What is there, or ValueError saying what provides it."""
    if value is None:
        raise ValueError(f"{name} is needed and absent: {_PROVIDED_BY[name]}")
    return value
