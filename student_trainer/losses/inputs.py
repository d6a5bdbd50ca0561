"""What one micro-batch hands to the losses: aligned tensors, checked and masked once.

Shape legend: B = sequences, T = response positions, K = teacher support, J = student top-k.
Index t is the t-th response token; nats; masked positions hold 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .divergences import check_log_probs

_PROVIDED_BY = {
    "teacher_topk_logprobs_BTK": "score the rollouts with the teacher's top-K (k >= 1)",
    "student_logprobs_at_teacher_topk_BTK": "gather the student at the teacher's top-K ids",
    "behavior_topk_logprobs_BTJ": "roll out with the student's top-k log-probs",
    "teacher_logprobs_at_student_topk_BTJ": "send the student's top-k ids to the teacher",
    "student_logprobs_at_student_topk_BTJ": "gather the student at its own top-k ids",
    "bad_events_BT": "score the rollouts under a drift policy (overlap metric and threshold)",
}
_STUDENT_FIELDS = (
    "student_logprobs_BT",
    "student_logprobs_at_teacher_topk_BTK",
    "student_logprobs_at_student_topk_BTJ",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossInputs:
    """One micro-batch, aligned: row t of every tensor is about response token t.

    Construction checks shapes, dtypes, gradients and that no log-prob is missing (non-finite) at a
    valid position, and writes 0.0 at masked positions, so that whatever stood there reaches neither
    loss nor gradient. Raises ValueError naming the tensor.
    """

    mask_BT: Tensor
    """bool, True where the token counts; special tokens already taken out."""
    behavior_logprobs_BT: Tensor
    """log-probs of the sampled tokens under the policy that sampled them."""
    student_logprobs_BT: Tensor
    """of the sampled tokens under the student being trained, with gradient."""
    teacher_logprobs_BT: Tensor
    """of the sampled tokens under the teacher."""
    teacher_topk_logprobs_BTK: Tensor | None = None
    """the teacher's K best tokens."""
    student_logprobs_at_teacher_topk_BTK: Tensor | None = None
    """the student at the teacher's K ids, with gradient."""
    behavior_topk_logprobs_BTJ: Tensor | None = None
    """the behaviour policy's J best tokens."""
    teacher_logprobs_at_student_topk_BTJ: Tensor | None = None
    """the teacher at those J ids."""
    student_logprobs_at_student_topk_BTJ: Tensor | None = None
    """the student being trained at those J ids, with gradient."""
    bad_events_BT: Tensor | None = None
    """bool, True where teacher and student disagree by the drift policy's measure."""

    def __post_init__(self) -> None:
        mask_BT = self.mask_BT
        if mask_BT.dtype != torch.bool or mask_BT.ndim != 2:
            raise ValueError(
                f"mask_BT must be bool with 2 axes, got {mask_BT.dtype} {tuple(mask_BT.shape)}"
            )
        if self.bad_events_BT is not None and (
            self.bad_events_BT.dtype != torch.bool or self.bad_events_BT.shape != mask_BT.shape
        ):
            raise ValueError(
                f"bad_events_BT must be bool of shape {tuple(mask_BT.shape)}, "
                f"got {self.bad_events_BT.dtype} {tuple(self.bad_events_BT.shape)}"
            )
        for suffix, ndim in (("_BT", 2), ("_BTK", 3), ("_BTJ", 3)):
            group = {n: t for n, t in self._log_probs().items() if n.endswith(suffix)}
            student = {n: t for n, t in group.items() if n in _STUDENT_FIELDS}
            fixed = {n: t for n, t in group.items() if n not in _STUDENT_FIELDS}
            if group:
                check_log_probs(ndim, student=student, fixed=fixed)
        self._check_complete()
        for name, tensor in self._log_probs().items():
            expanded = mask_BT if tensor.ndim == 2 else mask_BT.unsqueeze(-1)
            object.__setattr__(self, name, torch.where(expanded, tensor, 0.0))

    def _log_probs(self) -> dict[str, Tensor]:
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        skipped = ("mask_BT", "bad_events_BT")
        return {n: t for n, t in present.items() if t is not None and n not in skipped}

    def _check_complete(self) -> None:
        """Every log-prob is finite at valid positions; one device synchronisation for all."""
        tensors = self._log_probs()
        for name, tensor in tensors.items():
            if tensor.shape[:2] != self.mask_BT.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, "
                    f"mask_BT has shape {tuple(self.mask_BT.shape)}"
                )
        num_missing = []
        for tensor in tensors.values():
            finite = tensor.isfinite()
            finite_BT = finite if finite.ndim == 2 else finite.all(dim=-1)
            num_missing.append((~finite_BT & self.mask_BT).sum())
        for name, missing in zip(tensors, torch.stack(num_missing).tolist(), strict=True):
            if missing:
                raise ValueError(f"{name} is missing (not finite) at {missing} valid positions")


def need(tensor: Tensor | None, name: str) -> Tensor:
    """The tensor, or ValueError saying what provides it."""
    if tensor is None:
        raise ValueError(f"{name} is needed and absent: {_PROVIDED_BY[name]}")
    return tensor
