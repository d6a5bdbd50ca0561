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
    "behavior_logprobs_at_teacher_topk_BTK": "recompute the behavior log-probs with the learner",
    "bad_events_BT": "score the rollouts under a drift policy (overlap metric and threshold)",
    "teacher_entropies_BT": "score the rollouts with ScoreOptions.want_entropy",
    "student_entropies_BT": "gather the student's entropies with its log-probs",
    "response_ids_BT": "hand over the ids of the sampled tokens",
    "student_topk_in_teacher_topk_BTJ": "compare the student's top-k ids with the teacher's",
    "teacher_topk_in_student_topk_BTK": "compare the teacher's top-k ids with the student's",
    "sampled_in_teacher_topk_BT": "compare the sampled ids with the teacher's top-k ids",
    "sampled_in_student_topk_BT": "compare the sampled ids with the student's top-k ids",
}
_STUDENT_FIELDS = (
    "student_logprobs_BT",
    "student_logprobs_at_teacher_topk_BTK",
    "student_logprobs_at_student_topk_BTJ",
)
_FLAGS = (
    "bad_events_BT",
    "student_topk_in_teacher_topk_BTJ",
    "teacher_topk_in_student_topk_BTK",
    "sampled_in_teacher_topk_BT",
    "sampled_in_student_topk_BT",
)
"""bool fields besides mask_BT."""
_BOOL = ("bool", torch.bool)


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
    behavior_logprobs_at_teacher_topk_BTK: Tensor | None = None
    """the behaviour policy at the teacher's K ids."""
    teacher_entropies_BT: Tensor | None = None
    """nats, of the teacher's full distribution."""
    student_entropies_BT: Tensor | None = None
    """nats, of the full distribution of the student being trained; no gradient."""
    response_ids_BT: Tensor | None = None
    """int64, the sampled tokens; 0 where masked, which may be a real id: look at mask_BT."""
    student_topk_in_teacher_topk_BTJ: Tensor | None = None
    """bool, True where the student's candidate is one of the teacher's K."""
    teacher_topk_in_student_topk_BTK: Tensor | None = None
    """bool, True where the teacher's candidate is one of the student's J."""
    sampled_in_teacher_topk_BT: Tensor | None = None
    """bool, True where the sampled token is one of the teacher's K."""
    sampled_in_student_topk_BT: Tensor | None = None
    """bool, True where the sampled token is one of the student's J."""

    def __post_init__(self) -> None:
        mask_BT = self.mask_BT
        if mask_BT.dtype != torch.bool or mask_BT.ndim != 2:
            raise ValueError(
                f"mask_BT must be bool with 2 axes, got {mask_BT.dtype} {tuple(mask_BT.shape)}"
            )
        self._check_not_log_probs()
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
        """What is present and in nats: log-probs, and entropies, which keep the same rules."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        skipped = ("mask_BT", "response_ids_BT", *_FLAGS)
        return {n: t for n, t in present.items() if t is not None and n not in skipped}

    def _check_not_log_probs(self) -> None:
        """Types and shapes of flags and ids; False and 0 are written at masked positions."""
        numbers = self._log_probs()
        for name in (*_FLAGS, "response_ids_BT"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            shape = self.mask_BT.shape
            if not name.endswith("_BT"):
                suffix = name[-4:]
                alike = [t.shape for n, t in numbers.items() if n.endswith(suffix)]
                shape = alike[0] if alike else torch.Size((*shape, tensor.shape[-1]))
            kind, dtype = ("int64", torch.long) if name == "response_ids_BT" else _BOOL
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ValueError(
                    f"{name} must be {kind} of shape {tuple(shape)}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            expanded = self.mask_BT if tensor.ndim == 2 else self.mask_BT.unsqueeze(-1)
            object.__setattr__(self, name, tensor.masked_fill(~expanded, 0))

    def _check_complete(self) -> None:
        """Every number is finite at valid positions; one device synchronisation for all."""
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
