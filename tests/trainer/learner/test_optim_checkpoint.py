"""Optimiser steps and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from student_trainer.errors import CheckpointError, NonFiniteLossError
from student_trainer.learner.learner import Learner
from student_trainer.learner.optim import Optimizer
from student_trainer.pretrained import load_student
from student_trainer.train_state import (
    STATE_FILE,
    TrainState,
    latest,
    read_state,
    seconds_to_write,
    settings_of,
    step_of,
)
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student


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
    # The fused kernel rounds in another order.
    torch.testing.assert_close(model.weight, plain.weight, atol=0, rtol=1e-6)
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


class Counting:
    """A part of a run whose state is a number below ten."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def state(self) -> dict[str, int]:
        return {"number": self.number}

    def load(self, state: Mapping[str, int]) -> None:
        if state["number"] >= 10:
            raise ValueError(f"number is {state['number']}")
        self.number = state["number"]


def train_state(
    folder: Path, *, keep: int = 1, learner: Learner | None = None, **settings: str
) -> TrainState:
    """Of a learner and a number."""
    learner = learner or learner_of(tiny_student())
    return TrainState(
        folder,
        keep=keep,
        save_weights=learner.save,
        parts={"learner": learner, "counting": Counting(7)},
        settings=settings,
    )


def save(state: TrainState, step: int) -> Path:
    state.step = step
    return state.save()


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_training_is_bit_identical(tmp_path: Path, tied: bool) -> None:
    settings = {"warmup_updates": 1, "total_updates": 4}
    model = tiny_student(tied=tied)
    optim = optimizer(model, **settings)
    straight_state = train_state(tmp_path, learner=learner_of(model, optim))
    for number in range(4):
        if number == 2:
            save(straight_state, 2)
        update(model, optim, number)
    straight = weights(model)

    folder = latest(tmp_path)
    resumed = load_student(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    resumed_optim = optimizer(resumed, **settings)
    state = train_state(tmp_path, learner=learner_of(resumed, resumed_optim))
    assert state.load(folder) == []
    assert state.step == 2
    assert read_state(folder)["counting"] == {"number": 7}
    for number in (2, 3):
        update(resumed, resumed_optim, number)
    assert resumed_optim.learning_rate == optim.learning_rate
    got = weights(resumed)
    assert got.keys() == straight.keys()
    for name, tensor in straight.items():
        assert torch.equal(got[name], tensor), name


def test_changed_settings_of_the_optimiser_hold_from_the_resumed_step_on() -> None:
    model, other = vector(1.0, -2.0), vector(1.0, -2.0)
    before, after = optimizer(model), optimizer(other, learning_rate=1e-4, weight_decay=0.0)
    model.weight.grad = torch.tensor([1.0, 1.0])
    before.step(1.0)
    after.load(before.state())
    assert after.learning_rate == pytest.approx(1e-4 * before.learning_rate / 1e-2, rel=0.3)
    start = other.weight.detach().clone()
    other.weight.grad = torch.tensor([1.0, 1.0])
    after.step(1.0)
    # The moments agree with the gradient, so AdamW moves by the learning rate; without decay alike.
    assert (start - other.weight).tolist() == pytest.approx([after_rate(1)] * 2, rel=1e-3)


def after_rate(update: int) -> float:
    """Of the changed schedule: from 1e-4 up to its final 1e-3, ten updates."""
    return 1e-4 * (10 + (1 - 10) * 0.5 * (1 + math.cos(math.pi * update / 10)))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    state = train_state(tmp_path, keep=2)
    for step in (5, 10, 15):
        save(state, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    assert latest(tmp_path).name == "step-000015"
    assert step_of(latest(tmp_path)) == read_state(latest(tmp_path))["step"] == 15


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    state = train_state(tmp_path)
    save(state, 5)
    (tmp_path / "step-000005" / "left-over").touch()
    save(state, 5)
    assert not (tmp_path / "step-000005" / "left-over").exists()


def test_checkpoint_that_was_not_finished_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = train_state(tmp_path)
    save(state, 5)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            save(state, 10)
    assert latest(tmp_path).name == "step-000005"
    save(state, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]


def test_nothing_to_resume_from_is_an_error_naming_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/none: no checkpoint to resume from"):
        latest(tmp_path / "none")


def test_settings_are_read_without_the_tensors_beside_them(tmp_path: Path) -> None:
    folder = save(train_state(tmp_path, rate="0.1", seed="3"), 5)
    assert settings_of(folder) == {"rate": "0.1", "seed": "3"}


@pytest.mark.parametrize(
    ("every_steps", "every_minutes", "due"),
    [
        (3, None, [3, 6]),
        (3, 1.0, [3, 6]),
        (None, None, []),
        (None, 10.0, [3, 6]),
        (None, 1.0, [1, 2, 4, 6]),
    ],
)
def test_checkpoints_come_by_steps_or_by_the_clock_and_take_a_twentieth_of_it_at_most(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every_steps: int | None,
    every_minutes: float | None,
    due: list[int],
) -> None:
    """Steps of 200 s. The first checkpoint takes 1 s to write, those that follow 15 s."""
    clock = [0.0]
    monkeypatch.setattr("student_trainer.train_state.time.monotonic", lambda: clock[0])
    state = train_state(tmp_path)
    took: list[float] = []

    def save_weights(folder: Path) -> None:
        took.append(15.0 if took else 1.0)
        clock[0] += took[-1]

    state._save_weights = save_weights
    saved = []
    for step in range(1, 7):
        clock[0] += 200.0
        state.step = step
        if state.is_due(every_steps, every_minutes):
            state.save()
            saved.append(step)
    # After one of 15 s the next is due 300 s later: after two steps, not after one.
    assert saved == due


def test_a_part_that_may_begins_anew(tmp_path: Path) -> None:
    state = train_state(tmp_path)
    state._parts["counting"].number = 12  # type: ignore[index,attr-defined]
    folder = save(state, 5)
    assert train_state(tmp_path).load(folder, may_begin_anew=["counting"]) == ["counting"]


def test_part_that_cannot_go_on_is_named(tmp_path: Path) -> None:
    state = train_state(tmp_path)
    state._parts["counting"].number = 12  # type: ignore[index,attr-defined]
    folder = save(state, 5)
    with pytest.raises(CheckpointError, match=r"state of counting does not fit .* number is 12"):
        train_state(tmp_path).load(folder)


@pytest.mark.parametrize(("gigabytes", "said"), [(0.2, False), (10, False), (60, True)])
def test_a_write_that_takes_too_long_is_known_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: float, said: bool
) -> None:
    # A disk of 2 GiB/s: the probe of 64 MiB takes 1/32 s.
    now = iter([0.0, 1 / 32])
    monkeypatch.setattr("student_trainer.train_state.time.monotonic", lambda: next(now))
    seconds = seconds_to_write(tmp_path / "run", int(gigabytes * 2**30), limit_s=25.0)
    assert seconds == (pytest.approx(gigabytes / 2) if said else None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_checkpoint_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    model = tiny_student()
    optim = optimizer(model)
    update(model, optim, 0)
    learner = learner_of(model, optim)
    folder = save(train_state(tmp_path, learner=learner), 1)
    written = sum((folder / name).stat().st_size for name in ("model.safetensors", STATE_FILE))
    # Names, shapes and zip entries of a model this small are a fifth of its file.
    assert learner.checkpoint_bytes < written < 1.5 * learner.checkpoint_bytes


def test_folder_without_a_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no {STATE_FILE}"):
        read_state(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut short"])
def test_state_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot read {STATE_FILE}"):
        read_state(tmp_path)
