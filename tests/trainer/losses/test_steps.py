"""A step of an optimiser is the same however its responses are padded, ordered and split."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.losses import LossInputs
from student_trainer.losses.laws import inputs_of
from student_trainer.losses.objective import merge, needs_normalization, objective, step_scale
from student_trainer.losses.weight_choice import (
    BlockGate,
    PositionWeight,
    PrefixImportanceWeight,
    PruneWeight,
)
from tests.trainer.losses.loss_cases import DIVERGENCES, Case, case

torch.set_num_threads(1)

seeds = st.integers(0, 2**31)

LENGTHS = (1, 9, 4, 13, 6, 2)


@dataclasses.dataclass
class Batch:
    """Responses of unequal length, a case of one row each."""

    rows: list[Case]
    bad_events: list[Tensor]

    def gradients(
        self, micro_batches: list[list[int]], weights: list[PositionWeight], *, left: bool
    ) -> dict[str, Tensor]:
        """By divergence: the scaled gradient of a step over these micro-batches, by response."""
        made = [self.inputs(micro, left=left) for micro in micro_batches]
        leaves = [row.logits_BTV for row in self.rows]
        normalize = needs_normalization(weights)
        found = {}
        for name, loss in DIVERGENCES.items():
            parts = [objective(inputs, divergence=loss, weights=weights) for inputs in made]
            totals = merge(parts)
            scale = step_scale(totals.weight_sum.item(), totals.num_tokens.item(), normalize)
            gradients = torch.autograd.grad(totals.loss_sum, leaves, retain_graph=True)
            found[name] = scale * torch.cat([gradient.flatten() for gradient in gradients])
        return found

    def inputs(self, micro: list[int], *, left: bool) -> LossInputs:
        """Padded on one side, two columns more than needed; what is fixed is NaN where padded."""
        longest = max(LENGTHS[index] for index in micro) + 2

        def pad(tensors: list[Tensor], fill: float) -> Tensor:
            padded = []
            for tensor in tensors:
                filler = tensor.new_full((1, longest - tensor.shape[1], *tensor.shape[2:]), fill)
                padded.append(torch.cat([filler, tensor] if left else [tensor, filler], dim=1))
            return torch.cat(padded)

        rows = [self.rows[index] for index in micro]
        return inputs_of(
            pad([row.logits_BTV for row in rows], 7.0).log_softmax(-1),
            pad([row.behavior_BTV for row in rows], math.nan),
            pad([row.teacher_BTV for row in rows], math.nan),
            pad([row.sampled_BT for row in rows], 0),
            teacher_ids_BTK=pad([row.teacher_ids_BTK for row in rows], 0),
            student_ids_BTJ=pad([row.student_ids_BTJ for row in rows], 0),
            mask_BT=pad([torch.ones_like(row.sampled_BT).bool() for row in rows], False),
            bad_events_BT=pad([self.bad_events[index] for index in micro], True),
        )


TOGETHER: list[PositionWeight] = [
    PruneWeight(w_drop=0.1),
    PrefixImportanceWeight(),
    BlockGate(block_size=4, aggregate="rms"),
]


@pytest.mark.parametrize("weights", [[], TOGETHER], ids=["plain", "weighted"])
@settings(max_examples=12, deadline=None)
@given(seed=seeds, left=st.booleans(), order=st.permutations(range(6)), cut=st.integers(1, 5))
def test_padding_order_and_micro_batches_leave_the_step_unchanged(
    weights: list[PositionWeight], seed: int, left: bool, order: list[int], cut: int
) -> None:
    rows = [case(seed + n, shape=(1, n)) for n in LENGTHS]
    generator = torch.Generator().manual_seed(seed)
    bad_events = [torch.rand(1, n, generator=generator) < 0.4 for n in LENGTHS]
    batch = Batch(rows, bad_events)
    whole = batch.gradients([list(range(6))], weights, left=False)
    found = batch.gradients([order[:cut], order[cut:]], weights, left=left)
    for name, expected in whole.items():
        assert expected.norm() > 0, name
        # Sums in another order differ by a few roundings.
        assert (found[name] - expected).norm() <= 1e-13 * expected.norm(), name
