"""Rollouts to padded tensors, split so that a forward pass stays within a number of tokens.

Legend: B = sequences, S = prompt plus response positions, T = response positions, K = teacher
top-k, J = student top-k. Padding is on the right and holds 0; masks say what is real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from student_trainer.errors import NonFiniteLossError
from student_trainer.losses.inputs import LossInputs
from student_trainer.records import Rollout
from student_trainer.student import Gathered, student_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some rollouts as tensors; row t of every [B, T, ...] tensor belongs to response token t."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    prompt_lengths_B: Tensor
    response_ids_BT: Tensor
    response_mask_BT: Tensor
    """True for real response tokens."""
    mask_BT: Tensor
    """True for response tokens that count: real and not special."""
    behavior_logprobs_BT: Tensor
    teacher_logprobs_BT: Tensor
    teacher_topk_ids_BTK: Tensor
    teacher_topk_logprobs_BTK: Tensor
    student_topk_ids_BTJ: Tensor
    behavior_topk_logprobs_BTJ: Tensor
    teacher_logprobs_at_student_topk_BTJ: Tensor | None
    bad_events_BT: Tensor | None

    def forward(self, model: PreTrainedModel, *, temperature: float) -> Gathered:
        """The student at the response tokens, at the teacher's top-k and at its own top-k."""
        return student_forward(
            model,
            self.input_ids_BS,
            self.attention_mask_BS,
            self.prompt_lengths_B,
            self.response_ids_BT,
            self.response_mask_BT,
            (self.teacher_topk_ids_BTK, self.student_topk_ids_BTJ),
            temperature=temperature,
        )

    def loss_inputs(self, gathered: Gathered) -> LossInputs:
        """What the losses see: this batch and the student's present view of it.

        Raises NonFiniteLossError when the student gives a real token no finite log-prob.
        """
        if not gathered.logprobs_BT.isfinite().all():
            raise NonFiniteLossError("the student's log-probs are not finite: it has diverged")
        at_teacher_topk, at_student_topk = gathered.logprobs_at_BTN
        has_student_topk = self.teacher_logprobs_at_student_topk_BTJ is not None
        return LossInputs(
            mask_BT=self.mask_BT,
            behavior_logprobs_BT=self.behavior_logprobs_BT,
            student_logprobs_BT=gathered.logprobs_BT,
            teacher_logprobs_BT=self.teacher_logprobs_BT,
            teacher_topk_logprobs_BTK=self.teacher_topk_logprobs_BTK,
            student_logprobs_at_teacher_topk_BTK=at_teacher_topk,
            behavior_topk_logprobs_BTJ=self.behavior_topk_logprobs_BTJ
            if has_student_topk
            else None,
            teacher_logprobs_at_student_topk_BTJ=self.teacher_logprobs_at_student_topk_BTJ,
            student_logprobs_at_student_topk_BTJ=at_student_topk if has_student_topk else None,
            bad_events_BT=self.bad_events_BT,
        )


def collate(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """One padded batch of at least one rollout."""
    sequences = [np.concatenate([r.prompt.token_ids, r.response_ids]) for r in rollouts]

    def padded(arrays: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        longest = max(len(array) for array in arrays)
        out = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(out).to(device=device, dtype=dtype)

    def optional(arrays: Sequence[NDArray[np.generic] | None], dtype: torch.dtype) -> Tensor | None:
        present = [array for array in arrays if array is not None]
        return padded(present, dtype) if len(present) == len(arrays) else None

    ones = [np.ones(len(sequence), np.bool_) for sequence in sequences]
    return Batch(
        input_ids_BS=padded(sequences, torch.long),
        attention_mask_BS=padded(ones, torch.long),
        prompt_lengths_B=torch.tensor([len(r.prompt.token_ids) for r in rollouts], device=device),
        response_ids_BT=padded([r.response_ids for r in rollouts], torch.long),
        response_mask_BT=padded([np.ones(len(r), np.bool_) for r in rollouts], torch.bool),
        mask_BT=padded([r.mask for r in rollouts], torch.bool),
        behavior_logprobs_BT=padded([r.behavior_logprobs for r in rollouts], torch.float32),
        teacher_logprobs_BT=padded([r.teacher.token_logprobs for r in rollouts], torch.float32),
        teacher_topk_ids_BTK=padded([r.teacher.topk_ids for r in rollouts], torch.long),
        teacher_topk_logprobs_BTK=padded(
            [r.teacher.topk_logprobs for r in rollouts], torch.float32
        ),
        student_topk_ids_BTJ=padded([r.student_topk_ids for r in rollouts], torch.long),
        behavior_topk_logprobs_BTJ=padded(
            [r.student_topk_logprobs for r in rollouts], torch.float32
        ),
        teacher_logprobs_at_student_topk_BTJ=optional(
            [r.teacher.candidate_logprobs for r in rollouts], torch.float32
        ),
        bad_events_BT=optional([r.teacher.bad_events for r in rollouts], torch.bool),
    )


def split_updates(
    rollouts: Sequence[Rollout], num_updates: int, *, seed: tuple[int, ...]
) -> list[list[Rollout]]:
    """A shuffled pass over the rollouts as `num_updates` parts of nearly equal size."""
    order = np.random.default_rng(seed).permutation(len(rollouts))
    return [[rollouts[i] for i in part] for part in np.array_split(order, num_updates) if len(part)]


def split_micro(rollouts: Sequence[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """Parts whose padded size is at most `max_tokens`, a longer rollout alone; short with short."""
    parts: list[list[Rollout]] = []
    longest = 0
    for rollout in sorted(rollouts, key=_sequence_length):
        length = _sequence_length(rollout)
        if not parts or max(longest, length) * (len(parts[-1]) + 1) > max_tokens:
            parts.append([])
        parts[-1].append(rollout)
        longest = length
    return parts


def recompute_behavior(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    micro_batch_tokens: int,
    temperature: float,
    device: torch.device,
) -> list[Rollout]:
    """The rollouts with behavior log-probs from the learner, over the full vocabulary.

    Needed where the sampler's are renormalised on a nucleus: ratios and gates compare like with
    like.
    """
    recomputed = []
    for part in split_micro(rollouts, micro_batch_tokens):
        with torch.no_grad():
            gathered = collate(part, device).forward(model, temperature=temperature)
        for row, rollout in enumerate(part):
            length = len(rollout)
            recomputed.append(
                replace(
                    rollout,
                    behavior_logprobs=gathered.logprobs_BT[row, :length].cpu().numpy(),
                    student_topk_logprobs=gathered.logprobs_at_BTN[1][row, :length].cpu().numpy(),
                )
            )
    return recomputed


def _sequence_length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout)
