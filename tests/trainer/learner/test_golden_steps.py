"""Two steps of learning from recorded rollouts: the same to the bit, and as they always were.

Run: python -m pytest tests/trainer/learner/test_golden_steps.py
Figures anew, only where they are meant to change: python -m tests.trainer.learner.test_golden_steps
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.learner.learner import Learner
from student_trainer.losses.divergences import TruncatedReverseKL
from student_trainer.losses.policy_gradients import SampledReverseKL, StudentTopKReverseKL
from student_trainer.losses.weight_choice import BlockGate, EntropyTop, PruneWeight
from student_trainer.records import Rollout
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.recorded_rollouts import recorded_rollouts
from tests.trainer.learner.tiny_student import PAD_ID, tiny_student

FIGURES = Path(__file__).with_name("golden_steps.json")
NUM_STEPS = 2
TOLERANCE = 2e-5
"""Relative, of losses, norms and sums."""
ALONG = 5e-3
"""Of a change's length. AdamW's first steps are as long whatever the gradient, so rounding of a
small gradient shows: 1e-3 with SSE in place of AVX-512."""
ROUNDED_FIRST, ROUNDED_MOVED = 1e-2, 0.2
"""Relative, with rounded products: of the first step's loss and norm, and of the changes' lengths.
What they are after it depends on how the sums were cut: 7 % of the next norm with other parts."""

METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "student_topk, two passes in two updates, small micro-batches": lambda: {
        "divergence": StudentTopKReverseKL(),
        "epochs": 2,
        "updates_per_epoch": 2,
        "micro_batch_tokens": 120,
    },
    "truncated with a tail, pruned, the most uncertain": lambda: {
        "divergence": TruncatedReverseKL(tail=True),
        "weights": [PruneWeight(w_drop=0.1), EntropyTop(ratio=0.5)],
        "temperature": 0.7,
    },
    "sampled tokens, gated, behavior of the learner": lambda: {
        "divergence": SampledReverseKL(),
        "weights": [BlockGate(block_size=4)],
        "updates_per_epoch": 2,
        "recomputes_behavior": True,
    },
    "rounded products": lambda: {
        "divergence": StudentTopKReverseKL(),
        "dtype": torch.bfloat16,
    },
}


@cache
def rollouts_of(step: int) -> list[Rollout]:
    return recorded_rollouts(seed=step)


def learn(method: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Reports and sums over the weights, and the weights."""
    model = tiny_student(tied=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    learner: Learner = learner_of(model, excluded_ids=((PAD_ID, PAD_ID + 1),), **METHODS[method]())
    reports = [learner.learn(rollouts_of(step), step) for step in range(NUM_STEPS)]
    after = [parameter.detach().clone() for parameter in model.parameters()]
    moved = [(new - old).double() for new, old in zip(after, before, strict=True)]
    rng = np.random.default_rng(0)
    directions = [torch.from_numpy(rng.standard_normal(tuple(each.shape))) for each in moved]
    return {
        "loss": [report.loss for report in reports],
        "grad_norm": [report.grad_norm for report in reports],
        "loss_tokens": [report.loss_tokens for report in reports],
        "moved": [float(each.norm()) for each in moved],
        "moved_along": [
            float((each * along).sum()) for each, along in zip(moved, directions, strict=True)
        ],
    }, after


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bits(method: str) -> None:
    (first, weights), (second, again) = learn(method), learn(method)
    assert first == second
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_on_record(method: str) -> None:
    known = json.loads(FIGURES.read_text(encoding="utf-8"))[method]
    found, _ = learn(method)
    if "rounded" in method:
        for name in ("loss", "grad_norm"):
            assert found[name][0] == pytest.approx(known[name][0], rel=ROUNDED_FIRST), name
        assert found["moved"] == pytest.approx(known["moved"], rel=ROUNDED_MOVED)
        return
    for name in ("loss", "grad_norm", "loss_tokens", "moved"):
        assert found[name] == pytest.approx(known[name], rel=TOLERANCE), name
    # Along a random direction a part's change may come to nearly nothing: of its length, then.
    for along, expected, length in zip(
        found["moved_along"], known["moved_along"], known["moved"], strict=True
    ):
        assert abs(along - expected) < ALONG * length


if __name__ == "__main__":
    figures = {method: learn(method)[0] for method in METHODS}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
