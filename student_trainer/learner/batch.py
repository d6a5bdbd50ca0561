"""Rollouts to padded tensors, split so that a forward pass stays within a number of tokens.

Legend: B = sequences, S = prompt plus response positions, T = response positions, K = teacher
top-k, J = student top-k. Padding is on the right and holds 0; masks say what is real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from student_trainer.errors import NonFiniteLossError
from student_trainer.learner.student import Gathered, student_forward
from student_trainer.losses.inputs import Candidates, LossInputs
from student_trainer.losses.supports import MatchingSupport
from student_trainer.records import Rollout
from teacher_wire.id_ranges import IdRanges

PART_COSTS = {"cpu": 64, "other": 1024}
"""What a micro-batch costs besides its positions, in positions: gradients that are added up, calls
of kernels, and those that a GPU computes as fast with more to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some rollouts as tensors; row t of every [B, T, ...] tensor belongs to response token t."""

    input_ids_BS: Tensor
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
    behavior_logprobs_at_teacher_topk_BTK: Tensor | None
    teacher_entropies_BT: Tensor | None
    bad_events_BT: Tensor | None
    loss_weights_B: Tensor
    """What a token of each rollout counts in the loss."""

    def forward(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        dtype: torch.dtype = torch.float32,
        excluded_ids: IdRanges = (),
        only_counted: bool = False,
        mass_outside: MatchingSupport | None = None,
    ) -> Gathered:
        """The student at the response tokens, at the teacher's top-k and at its own top-k.

        `only_counted` leaves 0.0 at tokens that do not count: no loss sees them, and the head is
        spared their rows. `mass_outside` asks for the log of the mass outside a support too.
        """
        return student_forward(
            model,
            self.input_ids_BS,
            self.prompt_lengths_B,
            self.response_ids_BT,
            self.mask_BT if only_counted else self.response_mask_BT,
            (self.teacher_topk_ids_BTK, self.student_topk_ids_BTJ),
            temperature=temperature,
            dtype=dtype,
            excluded_ids=excluded_ids,
            support_BTN=None if mass_outside is None else self._support(mass_outside),
        )

    def _support(self, support: MatchingSupport) -> Tensor:
        """bool [B, T, 1 + K + J]: which of the sampled token and the two top-k belong to it."""
        lists = (
            (1, support != "teacher_topk"),
            (self.teacher_topk_ids_BTK.shape[-1], support != "student_topk_and_sampled"),
            (self.student_topk_ids_BTJ.shape[-1], support == "student_topk_and_sampled"),
        )
        belongs = [belongs for length, belongs in lists for _ in range(length)]
        belongs_N = torch.tensor(belongs, device=self.mask_BT.device)
        return belongs_N.expand(*self.mask_BT.shape, -1)

    def loss_inputs(self, gathered: Gathered, progress: float = 0.0) -> LossInputs:
        """What the losses see: this batch and the student's present view of it, after the share
        `progress` of the run.

        Raises NonFiniteLossError when the student gives a token no finite log-prob.
        """
        if not gathered.logprobs_BT.isfinite().all():
            raise NonFiniteLossError("the student's log-probs are not finite: it has diverged")
        at_teacher_topk, at_student_topk = gathered.logprobs_at_BTN
        sampled_ids, teacher_ids = self.response_ids_BT.unsqueeze(-1), self.teacher_topk_ids_BTK
        student_topk = in_student_topk = sampled_in_student_topk = None
        if self.teacher_logprobs_at_student_topk_BTJ is not None:
            student_ids = self.student_topk_ids_BTJ
            student_topk = Candidates(
                student_logprobs_BTN=at_student_topk,
                teacher_logprobs_BTN=self.teacher_logprobs_at_student_topk_BTJ,
                behavior_logprobs_BTN=self.behavior_topk_logprobs_BTJ,
                in_teacher_topk_BTN=contained(student_ids, teacher_ids),
            )
            in_student_topk = contained(teacher_ids, student_ids)
            sampled_in_student_topk = contained(sampled_ids, student_ids)
        return LossInputs(
            mask_BT=self.mask_BT,
            sampled=Candidates(
                student_logprobs_BTN=gathered.logprobs_BT.unsqueeze(-1),
                teacher_logprobs_BTN=self.teacher_logprobs_BT.unsqueeze(-1),
                behavior_logprobs_BTN=self.behavior_logprobs_BT.unsqueeze(-1),
                in_teacher_topk_BTN=contained(sampled_ids, teacher_ids),
                in_student_topk_BTN=sampled_in_student_topk,
            ),
            teacher_topk=Candidates(
                student_logprobs_BTN=at_teacher_topk,
                teacher_logprobs_BTN=self.teacher_topk_logprobs_BTK,
                behavior_logprobs_BTN=self.behavior_logprobs_at_teacher_topk_BTK,
                in_student_topk_BTN=in_student_topk,
            ),
            student_topk=student_topk,
            bad_events_BT=self.bad_events_BT,
            teacher_entropies_BT=self.teacher_entropies_BT,
            student_entropies_BT=gathered.entropy_BT,
            student_log_outside_BT=gathered.log_outside_BT,
            response_ids_BT=self.response_ids_BT,
            progress=progress,
        )


def contained(ids_BTN: Tensor, others_BTM: Tensor) -> Tensor:
    """bool [B, T, N]: whether an id is among the position's others.

    One pass an other, so that it never holds [B, T, N, M].
    """
    found_BTN = torch.zeros_like(ids_BTN, dtype=torch.bool)
    for other_BT in others_BTM.unbind(dim=-1):
        found_BTN |= ids_BTN == other_BT.unsqueeze(-1)
    return found_BTN


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

    return Batch(
        input_ids_BS=padded(sequences, torch.long),
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
        behavior_logprobs_at_teacher_topk_BTK=optional(
            [r.behavior_logprobs_at_teacher_topk for r in rollouts], torch.float32
        ),
        teacher_entropies_BT=optional([r.teacher.entropies for r in rollouts], torch.float32),
        bad_events_BT=optional([r.teacher.bad_events for r in rollouts], torch.bool),
        loss_weights_B=torch.tensor([r.loss_weight for r in rollouts], device=device),
    )


def split_updates(
    rollouts: Sequence[Rollout], num_updates: int, *, seed: tuple[int, ...]
) -> list[list[Rollout]]:
    """A shuffled pass over the rollouts as `num_updates` parts of nearly equal size."""
    order = np.random.default_rng(seed).permutation(len(rollouts))
    return [[rollouts[i] for i in part] for part in np.array_split(order, num_updates) if len(part)]


def part_costs(device: torch.device) -> int:
    """Of a micro-batch, in positions."""
    return PART_COSTS["cpu" if device.type == "cpu" else "other"]


def split_micro(
    rollouts: Sequence[Rollout], max_tokens: int, *, part_costs: int = PART_COSTS["cpu"]
) -> list[list[Rollout]]:
    """Parts whose padded size is at most `max_tokens`, a longer rollout alone; short with short.

    Of all such divisions that with the least to compute: positions, padding included, where one
    part more counts as `part_costs` of them. The rollouts of a part have a teacher's top-k of one
    size: none is padded with what no teacher said.
    """
    by_length = sorted(rollouts, key=lambda r: (_teacher_k(r), _sequence_length(r)))
    lengths = [_sequence_length(rollout) for rollout in by_length]
    # Least cost of the first n, and where the last part of them begins.
    cheapest: list[tuple[int, int]] = [(0, 0)]
    for end, longest in enumerate(lengths, 1):
        fitting = max(1, max_tokens // longest) if longest else end
        first = max(0, end - fitting)
        same_k = [
            start
            for start in range(first, end)
            if _teacher_k(by_length[start]) == _teacher_k(by_length[end - 1])
        ]
        cheapest.append(
            min((cheapest[at][0] + (end - at) * longest + part_costs, at) for at in same_k)
        )
    parts: list[list[Rollout]] = []
    end = len(by_length)
    while end:
        start = cheapest[end][1]
        parts.append(by_length[start:end])
        end = start
    return parts[::-1]


def padded_tokens(rollouts: Sequence[Rollout]) -> int:
    """Positions of a batch of these, padding included."""
    return len(rollouts) * max(map(_sequence_length, rollouts), default=0)


def recompute_behavior(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    micro_batch_tokens: int,
    temperature: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    excluded_ids: IdRanges = (),
    before_each: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """The rollouts with behavior log-probs from the learner, of all that it may say.

    Needed where the sampler's are renormalised on a nucleus: ratios and gates compare like with
    like. Also keeps them at the teacher's top-k, which no sampler knows while it generates.
    `before_each`: of the passes.
    """
    recomputed = []
    for part in split_micro(rollouts, micro_batch_tokens, part_costs=part_costs(device)):
        before_each()
        with torch.no_grad():
            batch = collate(part, device)
            gathered = batch.forward(
                model, temperature=temperature, dtype=dtype, excluded_ids=excluded_ids
            )
        own = gathered.logprobs_BT.cpu().numpy()
        at_teacher_topk, at_student_topk = (at.cpu().numpy() for at in gathered.logprobs_at_BTN)
        for row, rollout in enumerate(part):
            stop = len(rollout)
            recomputed.append(
                replace(
                    rollout,
                    behavior_logprobs=own[row, :stop],
                    student_topk_logprobs=at_student_topk[row, :stop],
                    behavior_logprobs_at_teacher_topk=at_teacher_topk[row, :stop],
                )
            )
    return recomputed


def _teacher_k(rollout: Rollout) -> int:
    return int(rollout.teacher.topk_ids.shape[1])


def _sequence_length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout)
