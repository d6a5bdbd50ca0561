"""Optimiser steps and checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from student_trainer.errors import CheckpointError, NonFiniteLossError
from student_trainer.learner.checkpoint import STATE_FILE, Checkpoints, load_state
from student_trainer.learner.optim import Optimizer
from student_trainer.learner.student import load_student
from tests.trainer.learner.tiny_student import character_tokenizer, tiny_student


def optimizer(model: torch.nn.Module, **changes: object) -> Optimizer:
    """Plain settings unless told."""
    settings: dict[str, object] = {
        "learning_rate": 1e-2,
        "final_learning_rate": 1e-3,
        "warmup_updates": 0,
        "total_updates": 10,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    }
    return Optimizer(model, **{**settings, **changes})  # type: ignore[arg-type]


def vector(*values: float) -> torch.nn.Module:
    """A model of one parameter."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(values))
    return module


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_step_is_adamw_on_the_scaled_and_clipped_gradient(max_norm: float) -> None:
    model, plain = vector(1.0, -2.0), vector(1.0, -2.0)
    ours = optimizer(model, max_grad_norm=max_norm)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    model.weight.grad = torch.tensor([30.0, 40.0])
    norm = ours.step(0.1)
    assert norm == pytest.approx(5.0)
    scaled = torch.tensor([3.0, 4.0])
    # clip_grad_norm_ divides by norm + 1e-6.
    plain.weight.grad = scaled * min(1.0, max_norm / (5.0 + 1e-6))
    adamw.step()
    assert torch.equal(model.weight, plain.weight)
    assert model.weight.grad is None


def test_accumulated_gradients_are_scaled_once() -> None:
    model, plain = vector(1.0, -2.0), vector(1.0, -2.0)
    ours, other = (optimizer(m, max_grad_norm=100.0) for m in (model, plain))
    for part in ([1.0, 2.0], [3.0, 5.0]):
        (model.weight * torch.tensor(part)).sum().backward()
    plain.weight.grad = torch.tensor([4.0, 7.0])
    assert ours.step(0.25) == other.step(0.25)
    assert torch.equal(model.weight, plain.weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_leaves_weights_and_optimiser_as_they_were(bad: float) -> None:
    model, plain = vector(1.0, -2.0), vector(1.0, -2.0)
    ours, other = optimizer(model), optimizer(plain)
    for optim, module in ((ours, model), (other, plain)):
        module.weight.grad = torch.tensor([1.0, 1.0])
        optim.step(1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([bad, 1.0])
    with pytest.raises(NonFiniteLossError, match="weights are left as they were"):
        ours.step(1.0)
    assert torch.equal(model.weight, before)
    assert ours.learning_rate == other.learning_rate
    for optim, module in ((ours, model), (other, plain)):
        module.weight.grad = torch.tensor([0.5, 1.0])
        optim.step(1.0)
    assert torch.equal(model.weight, plain.weight)


def test_learning_rate_warms_up_and_ends_at_the_final_one() -> None:
    model = vector(1.0)
    optim = optimizer(model, warmup_updates=2, total_updates=6)
    rates = []
    for _ in range(7):
        rates.append(optim.learning_rate)
        model.weight.grad = torch.tensor([1.0])
        optim.step(1.0)
    middle = 1e-3 + 9e-3 * 0.5
    assert rates[:3] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert rates[4] == pytest.approx(middle)
    assert rates[6] == pytest.approx(1e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def update(model: Qwen3ForCausalLM, optim: Optimizer, number: int) -> None:
    """One update on numbered made-up sequences."""
    ids = torch.randint(2, 30, (2, 6), generator=torch.Generator().manual_seed(number))
    model(ids, labels=ids).loss.backward()
    optim.step(1.0)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_training_is_bit_identical(tmp_path: Path, tied: bool) -> None:
    settings = {"warmup_updates": 1, "total_updates": 4}
    model = tiny_student(tied=tied)
    optim = optimizer(model, **settings)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in range(4):
        if number == 2:
            state = {"optimizer": optim.state_dict(), "budget": {"max_tokens": 7}}
            checkpoints.save(2, model, character_tokenizer(), state)
        update(model, optim, number)
    straight = weights(model)

    folder = checkpoints.latest()
    resumed = load_student(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    resumed_optim = optimizer(resumed, **settings)
    state = load_state(folder)
    assert state["step"] == 2
    assert state["budget"] == {"max_tokens": 7}
    resumed_optim.load_state_dict(state["optimizer"])
    for number in (2, 3):
        update(resumed, resumed_optim, number)
    assert resumed_optim.learning_rate == optim.learning_rate
    got = weights(resumed)
    assert got.keys() == straight.keys()
    for name, tensor in straight.items():
        assert torch.equal(got[name], tensor), name


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(step, tiny_student(), character_tokenizer(), {"budget": step})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        save(checkpoints, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    assert checkpoints.latest().name == "step-000015"
    assert load_state(checkpoints.latest())["budget"] == 15


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 5)
    (tmp_path / "step-000005" / "left-over").touch()
    save(checkpoints, 5)
    assert not (tmp_path / "step-000005" / "left-over").exists()


def test_checkpoint_that_was_not_finished_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 5)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            save(checkpoints, 10)
    assert checkpoints.latest().name == "step-000005"
    save(checkpoints, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]


def test_nothing_to_resume_from_is_an_error_naming_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/none: no checkpoint to resume from"):
        Checkpoints(tmp_path / "none", keep=1).latest()


def test_new_run_does_not_mix_its_checkpoints_with_older_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.refuse_older()
    save(checkpoints, 40)
    with pytest.raises(CheckpointError, match=r"step-000040.*--resume.*run\.out"):
        Checkpoints(tmp_path, keep=1).refuse_older()


def test_folder_without_a_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no {STATE_FILE}"):
        load_state(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut short"])
def test_state_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot read {STATE_FILE}"):
        load_state(tmp_path)
