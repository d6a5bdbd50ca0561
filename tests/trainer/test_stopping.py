"""Whenever a run is asked to stop, what is saved is its last finished step.

The request comes at a chosen moment of the main thread, where a signal would. Real processes and
signals: tests/faults/test_stop_trainer.py. Run: python -m pytest tests/trainer/test_stopping.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from student_trainer.assembly.evaluating import Evaluator
from student_trainer.assembly.run import Run, assembled
from student_trainer.diagnostics.step_report import EvalReport
from student_trainer.learner.batch import Batch
from student_trainer.learner.optim import Optimizer
from student_trainer.process.ranks import Ranks
from student_trainer.process.stopping import Stopped, StopRequest
from student_trainer.recording.recorder import Recorder
from student_trainer.rollouts.stream import RolloutStream
from student_trainer.rollouts.weight_sync import WeightSync
from student_trainer.settings.config import TrainerConfig
from student_trainer.train import train
from student_trainer.train_state import TrainState, complete_checkpoints
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student
from tests.trainer.made_rollouts import random_rollout
from tests.trainer.test_train import (
    InMemoryClient,
    configured,
    connect_to,
    folder,
    prepared,
    records,
    run_through,
)

__all__ = ["folder"]
Weights: TypeAlias = dict[str, torch.Tensor]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> InMemoryClient:
    """The teacher that every run below gets."""
    made = InMemoryClient()
    connect_to(made, monkeypatch)
    return made


def settings(folder: Path, name: str, *overrides: str) -> TrainerConfig:
    """Two updates a step, no checkpoints of its own."""
    return configured(
        folder,
        f"run.out={folder}/{name}",
        "checkpoint.every_steps=null",
        "eval.pass_k=0",
        *overrides,
    )


def stopped_at(
    config: TrainerConfig,
    monkeypatch: pytest.MonkeyPatch,
    owner: type[Any],
    method: str,
    call: int,
) -> None:
    """Trains until the request comes, as a call of a method begins, and gives up."""
    stop, calls, original = StopRequest(), 0, getattr(owner, method)

    def asks(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            stop.request()
        return original(*arguments, **named)

    with monkeypatch.context() as patch, assembled(config, stop=stop) as run:
        patch.setattr(owner, method, asks)
        with pytest.raises(Stopped):
            train(run)
        run.give_up()


# Steps have two micro-batches or more, so that the gradient of an update has a middle.
MOMENTS: dict[str, tuple[type[Any], str, int, int]] = {
    "as rollouts are asked for": (RolloutStream, "take", 3, 2),
    "in the gradient of the first update": (Batch, "forward", 2, 0),
    "in the first update": (Optimizer, "step", 5, 3),
    "in the second update": (Optimizer, "step", 6, 3),
    "as a step is written down": (Recorder, "step", 2, 2),
    "in a sync": (WeightSync, "push", 2, 2),
    "in an evaluation": (Run, "evaluate", 2, 2),
}
"""The call at whose beginning the request comes, and how many steps are finished then."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainerConfig, Weights]:
    """The undisturbed run, and the weights that it saved."""
    with pytest.MonkeyPatch.context() as patch:
        connect_to(InMemoryClient(), patch)
        config = settings(prepared(tmp_path_factory.mktemp("straight")), "straight")
        return config, run_through(config)


@pytest.mark.parametrize("moment", MOMENTS)
def test_run_that_was_stopped_at_any_moment_and_resumed_equals_one_that_was_not(
    folder: Path,
    client: InMemoryClient,
    straight: tuple[TrainerConfig, Weights],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    owner, method, call, finished = MOMENTS[moment]
    config = settings(folder, "stopped")
    stopped_at(config, monkeypatch, owner, method, call)
    saved = [path.name for path in complete_checkpoints(config.run.out / "checkpoints")]
    assert saved == ([f"step-{finished:06d}"] if finished else [])
    summary = json.loads((config.run.out / "summary.json").read_text())
    assert (summary["finished"], summary["steps_done"]) == (False, finished)
    assert len(records(config, "step")) == finished
    if finished:
        assert_same_run(config, run_through(config, resume=True), *straight)


@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [(RolloutStream, "take", 3), (WeightSync, "push", 2)],
    ids=["as rollouts are asked for", "in a sync, the next rollouts under way"],
)
def test_run_that_goes_ahead_and_was_stopped_goes_on_from_the_step_that_was_learnt_from(
    folder: Path,
    client: InMemoryClient,
    monkeypatch: pytest.MonkeyPatch,
    owner: type[Any],
    method: str,
    call: int,
) -> None:
    # What was generated ahead is generated again, by the weights that go on.
    config = settings(folder, "run", "rollout.max_staleness=1")
    stopped_at(config, monkeypatch, owner, method, call)
    run_through(config, resume=True)
    steps = records(config, "step")
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert [s["staleness_min_version"] for s in steps] == [0, 0, 2, 2]
    assert json.loads((config.run.out / "summary.json").read_text())["finished"] is True


def assert_same_run(
    config: TrainerConfig, weights: Weights, other_config: TrainerConfig, other_weights: Weights
) -> None:
    """The same figures of every step and evaluation, the same weights at the end."""
    for name, tensor in other_weights.items():
        assert torch.equal(weights[name], tensor), name
    for kind, names in (("step", ("loss", "grad_norm", "kept_tokens")), ("eval", ("accuracy",))):
        pair = [records(made, kind) for made in (config, other_config)]
        one, other = ([(r["step"], *(r[n] for n in names)) for r in made] for made in pair)
        assert one == other
    assert json.loads((config.run.out / "summary.json").read_text())["finished"] is True


def test_a_step_whose_checkpoint_is_there_is_not_written_again(
    folder: Path, client: InMemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folder, "run", "checkpoint.every_steps=1")
    saves: list[int] = []
    save = TrainState.save

    def saving(state: TrainState) -> Path:
        saves.append(state.step)
        return save(state)

    monkeypatch.setattr(TrainState, "save", saving)
    stopped_at(config, monkeypatch, RolloutStream, "take", 3)
    assert saves == [1, 2]


class Both(Ranks):
    """The first of two processes; the other has what it has, or what is said here."""

    said: Any = None

    def gathered(self, own: Any) -> list[Any]:
        return [own, own if self.said is None else self.said]


class OtherAsked(Both):
    said = True


def test_a_last_evaluation_that_was_given_up_for_several_processes_leaves_the_run_unfinished(
    folder: Path, client: InMemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stop = settings(folder, "run", "run.steps=1"), StopRequest()
    report, calls = Evaluator.report, list[int]()

    def asks(*arguments: Any, **named: Any) -> EvalReport:
        calls.append(named["step"])
        if calls == [0, 1]:
            stop.request()
        return report(*arguments, **named)

    monkeypatch.setattr(Evaluator, "report", asks)
    with assembled(config, stop=stop) as run:
        first = replace(run, ranks=Both(world=2))
        with pytest.raises(Stopped):
            train(first)
        first.give_up()
    assert json.loads((config.run.out / "summary.json").read_text())["finished"] is False
    run_through(config, resume=True)
    assert calls == [0, 1, 1]
    assert [record["step"] for record in records(config, "eval")] == [0, 1]


def test_the_sampler_is_not_sent_what_nobody_will_sample_from(
    folder: Path, client: InMemoryClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where another one of several processes was asked to stop, and will say the last words."""
    with assembled(settings(folder, "run")) as run:
        one = replace(run, ranks=OtherAsked(rank=1, world=2))
        assert one.swap_weights(1) is None
        assert run.stop.requested
    assert run.stream.policy_version == 0
    quiet = StopRequest()
    with quiet.on_sigterm(lambda: "saved"):
        quiet.say_last_words(aloud=False)
        quiet.say_last_words()
    assert "saved" not in capsys.readouterr().err


def test_nothing_is_interrupted_but_where_it_may_be() -> None:
    stop = StopRequest()
    done: list[str] = []
    with stop.may_give_up():
        done.append("before")
    stop.request()
    done.append("held")
    with pytest.raises(Stopped), stop.may_give_up():
        done.append("never")
    assert done == ["before", "held"]


def test_what_fails_because_everything_is_being_stopped_is_no_error() -> None:
    def die(stop: StopRequest) -> None:
        stop.requested = True
        raise ConnectionResetError("the engine has ended")

    stop = StopRequest()
    with pytest.raises(Stopped), stop.may_give_up():
        die(stop)
    with pytest.raises(ConnectionResetError), StopRequest().may_give_up():
        die(StopRequest())


@pytest.mark.parametrize("num_updates", [1, 3])
def test_learner_finishes_the_updates_that_it_began(
    num_updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rollouts = [random_rollout(rng, num_response=n) for n in (3, 5, 4)]
    stop = StopRequest()
    step = Optimizer.step

    def asks(optimizer: Optimizer, scale: float) -> float:
        stop.request()
        return step(optimizer, scale)

    monkeypatch.setattr(Optimizer, "step", asks)
    learner = learner_of(tiny_student(), updates_per_epoch=num_updates, stop=stop)
    assert learner.learn(rollouts, 0).updates == num_updates
    with pytest.raises(Stopped):
        learner.learn(rollouts, 1)
    assert learner.state()["optimizer"]["updates"] == num_updates
