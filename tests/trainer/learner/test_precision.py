"""bfloat16 arithmetic over float32 weights learns what float32 does, and so does AdamW in 8 bits.

Run: pytest tests/trainer/learner/test_precision.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_trainer.errors import ConfigError
from student_trainer.learner import optim as optim_module
from student_trainer.learner.optim import Optimizer, OptimizerKind
from student_trainer.learner.precision import lost_in_rounding
from student_trainer.records import Rollout
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student
from tests.trainer.made_rollouts import random_rollout

UPDATES = 20


def rollouts(step: int) -> list[Rollout]:
    rng = np.random.default_rng(step)
    return [random_rollout(rng, num_prompt=4, num_response=24) for _ in range(8)]


def change(
    dtype: torch.dtype, learning_rate: float, updates: int, kind: OptimizerKind = "adamw"
) -> Tensor:
    """Of all weights, flat, by so many updates of a tiny student."""
    model = tiny_student()
    before = flat(model)
    learner = learner_of(model, steady(model, learning_rate, updates, kind), dtype=dtype)
    for step in range(updates):
        learner.learn(rollouts(step), step)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return flat(model) - before


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def steady(
    model: PreTrainedModel, learning_rate: float, updates: int, kind: OptimizerKind = "adamw"
) -> Optimizer:
    return Optimizer(
        model,
        learning_rate=learning_rate,
        final_learning_rate=learning_rate,
        warmup_updates=0,
        total_updates=updates,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
        kind=kind,
    )


def test_weights_that_move_in_float32_move_in_bfloat16_too() -> None:
    exact, rounded = (change(dtype, 1e-6, 1) for dtype in (torch.float32, torch.bfloat16))
    moved = exact != 0
    assert moved.float().mean() > 0.5
    assert (rounded[moved] != 0).float().mean() >= 0.99


@pytest.mark.parametrize("learning_rate", [1e-6, 1e-4])
def test_twenty_updates_in_bfloat16_are_those_in_float32(learning_rate: float) -> None:
    exact, rounded = (
        change(dtype, learning_rate, UPDATES) for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0.99 <= rounded.norm() / exact.norm() <= 1.01
    assert torch.cosine_similarity(exact, rounded, dim=0) >= 0.99


def test_what_a_rounded_copy_loses_is_the_share_of_changed_weights_that_it_shows_as_before() -> (
    None
):
    before = torch.tensor([1.0, 1.0, 2.0, 4.0])
    after = torch.tensor([1.0, 1.0 + 2**-9, 2.5, 4.0 + 2**-12])
    assert lost_in_rounding(before, after, torch.bfloat16) == pytest.approx(2 / 3)
    assert lost_in_rounding(before, after, torch.float32) == 0.0
    assert lost_in_rounding(before, before, torch.bfloat16) is None


def test_a_learner_reports_what_the_samplers_copy_loses_of_a_step() -> None:
    """As counted over every weight; of a copy in float32 there is nothing to report."""
    reported = []
    for copied_to in (torch.float32, torch.bfloat16):
        model = tiny_student()
        before = flat(model)
        learner = learner_of(model, steady(model, 1e-4, 1), copied_to=copied_to)
        reported.append(learner.learn(rollouts(0), 0).lost_in_rounding)
    whole = lost_in_rounding(before, flat(model), torch.bfloat16)
    assert reported == [None, pytest.approx(whole, abs=0.02)]
    assert whole is not None
    assert 0.1 < whole < 0.9


def test_optimiser_that_is_not_installed_is_refused_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optim_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optim\.kind is 'adamw_8bit'.*driftline\[eightbit\]"):
        change(torch.float32, 1e-4, 1, "adamw_8bit")


@pytest.fixture(name="eager")
def _eager() -> Iterator[None]:
    """torchao compiles its step, a minute on a CPU; the same step uncompiled."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_eight_bits_follow_thirty_two() -> None:
    exact, rounded = (change(torch.float32, 1e-4, 5, kind) for kind in ("adamw", "adamw_8bit"))  # type: ignore[arg-type]
    assert torch.cosine_similarity(exact, rounded, dim=0) >= 0.95
    assert not torch.equal(exact, rounded)


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_eight_bits_resume_to_the_bit(tmp_path: Any) -> None:
    def made() -> tuple[torch.nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(128, 64)
        optimizer = Optimizer(
            model,  # type: ignore[arg-type]
            learning_rate=1e-2,
            final_learning_rate=1e-3,
            warmup_updates=0,
            total_updates=6,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            max_grad_norm=1.0,
            kind="adamw_8bit",
        )
        return model, optimizer

    def update(model: torch.nn.Module, optimizer: Optimizer, number: int) -> None:
        inputs = torch.randn(8, 128, generator=torch.Generator().manual_seed(number))
        model(inputs).square().sum().backward()
        optimizer.step(1.0)

    model, optimizer = made()
    for number in range(4):
        if number == 2:
            torch.save(optimizer.state(), tmp_path / "state.pt")
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        update(model, optimizer, number)
    resumed, resumed_optimizer = made()
    resumed.load_state_dict(weights)
    resumed_optimizer.load(torch.load(tmp_path / "state.pt", weights_only=True))
    for number in (2, 3):
        update(resumed, resumed_optimizer, number)
    assert torch.equal(resumed.weight, model.weight)  # type: ignore[arg-type]
    assert "torchao" in sys.modules


def test_moments_of_another_kind_are_refused() -> None:
    model = tiny_student()
    optimizer = Optimizer(
        model,
        learning_rate=1e-3,
        final_learning_rate=1e-3,
        warmup_updates=0,
        total_updates=1,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    with pytest.raises(ValueError, match=r"optim\.kind was 'adamw_8bit' and is 'adamw'"):
        optimizer.load({"kind": "adamw_8bit", "moments": {}, "updates": 3})


def test_logged_learning_rate_is_that_of_the_step() -> None:
    model = tiny_student()
    optimizer = Optimizer(
        model,
        learning_rate=1e-3,
        final_learning_rate=0.0,
        warmup_updates=1,
        total_updates=3,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    learner = learner_of(model, optimizer)
    rates = []
    for step in range(3):
        rates.append(optimizer.learning_rate)
        assert learner.learn(rollouts(step)[:2], step).learning_rate == rates[-1]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4])
