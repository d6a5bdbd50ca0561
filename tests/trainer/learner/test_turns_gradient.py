"""What others said is read by the student and by nobody counted.

Run: pytest tests/trainer/learner/test_turns_gradient.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.learner.batch import Batch, collate
from student_trainer.losses.objective import Divergence, objective
from student_trainer.losses.weight_choice import (
    BlockGate,
    EntropyTop,
    ImportanceRatio,
    PositionWeight,
    PositionWindow,
    PrefixImportanceWeight,
    PruneWeight,
)
from student_trainer.records import Rollout
from tests.trainer.learner.tiny_student import VOCAB_SIZE, tiny_student
from tests.trainer.losses.loss_cases import DIVERGENCES
from tests.trainer.made_rollouts import random_rollout

CPU = torch.device("cpu")
SAMPLED = np.array([1, 1, 1, 0, 0, 1, 1, 0, 1], np.bool_)
WEIGHTS: list[PositionWeight] = [
    PruneWeight(w_drop=0.3, w_base=0.5),
    PrefixImportanceWeight(gamma=0.5),
    BlockGate(block_size=2, tau=1.0),
    PositionWindow(start_share=0.2, end_share=1.0),
    EntropyTop(ratio=0.5),
]


def conversation(seed: int) -> Rollout:
    """Three answers with two turns of others between them; student and teacher agree on most of
    their candidates."""
    made = random_rollout(np.random.default_rng(seed), num_response=len(SAMPLED))
    teacher = made.teacher
    shared = replace(
        made,
        student_topk_ids=teacher.topk_ids[:, :3],
        teacher=replace(teacher, candidate_logprobs=teacher.topk_logprobs[:, :3]),
    )
    return with_turns(shared, seed)


def with_turns(rollout: Rollout, seed: int) -> Rollout:
    """The same answers, with other things said between them and said of those."""
    other = random_rollout(np.random.default_rng(1000 + seed), num_response=len(SAMPLED))

    def mixed(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        out = own.copy()
        out[~SAMPLED] = others[~SAMPLED]
        return out

    teacher = rollout.teacher
    rows = {
        name: mixed(getattr(teacher, name), getattr(other.teacher, name))
        for name in ("topk_ids", "topk_logprobs", "token_logprobs", "candidate_logprobs")
    }
    return replace(
        rollout,
        response_ids=mixed(rollout.response_ids, other.response_ids),
        behavior_logprobs=np.where(SAMPLED, rollout.behavior_logprobs, 0.0).astype(np.float32),
        student_topk_ids=mixed(
            rollout.student_topk_ids, np.tile(np.arange(3, dtype=np.int32), (len(SAMPLED), 1))
        ),
        student_topk_logprobs=np.where(SAMPLED[:, None], rollout.student_topk_logprobs, 0.0).astype(
            np.float32
        ),
        behavior_logprobs_at_teacher_topk=mixed(
            np.float32(rollout.teacher.topk_logprobs - 0.1), other.teacher.topk_logprobs
        ),
        teacher=replace(teacher, **rows),
        mask=SAMPLED.copy(),
        sampled=SAMPLED.copy(),
    )


def view(
    batch: Batch, logprobs: Tensor, at: tuple[Tensor, Tensor], entropy: Tensor, outside: Tensor
) -> object:
    """The student's log-probs by hand, as leaves."""
    from student_trainer.learner.student import Gathered

    gathered = Gathered(
        logprobs_BT=logprobs, logprobs_at_BTN=at, entropy_BT=entropy, log_outside_BT=outside
    )
    return batch.loss_inputs(gathered)


@pytest.mark.parametrize("weights", [[], WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_the_gradient_where_others_speak_is_exactly_nil(
    divergence: Divergence, weights: list[PositionWeight]
) -> None:
    """Given the student's log-probs, whatever was said there changes not one bit of the loss."""
    rollout = conversation(1)
    behavior = collate([rollout], CPU)
    # Near on policy, so that no clip swallows the gradient.
    logprobs = behavior.behavior_logprobs_BT - 0.01
    at = (
        behavior.teacher_topk_logprobs_BTK - 0.3,
        behavior.behavior_topk_logprobs_BTJ - 0.01,
    )
    entropy = -logprobs / 2
    found = []
    for other in (rollout, with_turns(rollout, 77)):
        leaves = [t.clone().requires_grad_() for t in (logprobs, *at, logprobs - 3)]
        given, *topk, outside = leaves
        inputs = view(collate([other], CPU), given, (topk[0], topk[1]), entropy, outside)
        part = objective(inputs, divergence=divergence, weights=weights)  # type: ignore[arg-type]
        part.loss_sum.backward()
        assert part.num_tokens.item() == SAMPLED.sum() == other.num_sampled
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        assert torch.stack([grad.abs().sum() for grad in grads]).sum() > 0
        for grad in grads:
            assert (grad[0, ~SAMPLED] == 0).all()
        found.append((part.loss_sum.detach(), [grad[0, SAMPLED] for grad in grads]))
    (loss, grads), (loss_too, grads_too) = found
    assert torch.equal(loss, loss_too)
    assert all(map(torch.equal, grads, grads_too))


def test_an_importance_ratio_is_of_the_students_tokens_alone() -> None:
    rollout = conversation(2)
    batch = collate([rollout, with_turns(rollout, 9)], CPU)
    model = tiny_student()
    gathered = batch.forward(model, temperature=1.0, mass_outside="teacher_topk")
    inputs = batch.loss_inputs(gathered)
    for mode in ("truncate", "mask"):
        part = objective(
            inputs,
            divergence=DIVERGENCES["forward"],
            weights=[ImportanceRatio(mode=mode)],  # type: ignore[arg-type]
        )
        assert part.num_tokens.item() == 2 * SAMPLED.sum()
        assert part.loss_sum.isfinite()


def test_what_was_said_changes_the_loss_through_what_the_student_reads() -> None:
    """By the model itself: nothing before the first turn notices, all that comes after may."""
    rollout = conversation(3)
    ids = rollout.response_ids.copy()
    ids[~SAMPLED] = (ids[~SAMPLED] + 5) % VOCAB_SIZE
    model = tiny_student().eval()
    seen = []
    for other in (rollout, replace(rollout, response_ids=ids)):
        batch = collate([other], CPU)
        with torch.no_grad():
            inputs = batch.loss_inputs(batch.forward(model, temperature=1.0))
        seen.append(inputs.sampled.student_logprobs_BTN[0, :, 0])
    first, second = seen
    assert torch.equal(first[:3], second[:3])
    assert (first[SAMPLED][3:] != second[SAMPLED][3:]).all()
