"""A sampler that dies in the middle of a run: another takes its place, once, and nothing is lost.

The reference sampler and the batched one, which die when they are told. vLLM's engine, killed:
test_kill_sampler.py. Run: python -m pytest tests/faults/test_sampler_restart.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from student_trainer.assembly import from_settings
from student_trainer.assembly.run import assembled
from student_trainer.errors import SamplerDiedError, SamplerError
from student_trainer.process.ranks import Ranks
from student_trainer.process.stopping import Stopped, StopRequest
from student_trainer.records import Delta, SamplingOptions
from student_trainer.rollouts.samplers.base import Weights
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.samplers.running_batch import RunningBatch
from student_trainer.settings.config import TrainerConfig
from student_trainer.train import train
from tests.rounds import in_the_long_round
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
ROLLOUT_TOKENS, NUM_ENDED = 7, 5
"""What tells a rollout from other requests, and the one of all with which a batch fails."""
ONCE = (
    "rollout.prompts_per_step=2",
    f"budget.max_tokens={ROLLOUT_TOKENS}",
    "eval.pass_k=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep=1",
)


class Mortal(HfSampler):
    """Dies as a token or a tensor of weights is to come, and stays dead."""

    made: list[Mortal] = []  # noqa: RUF012 - of the class, which is made anew for every test
    deaths: list[str] = []  # noqa: RUF012
    """The beginnings of the requests that kill, in order; "weights": as they are loaded."""
    stop: StopRequest | None = None
    """Asked first, where a signal ends the engine too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.is_dead = self.is_closed = False
        self.made.append(self)

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        async for delta in super().generate(request_id, prompt_ids, options):
            yield delta
            self._live(request_id)

    async def load_weights(self, weights: Weights) -> None:
        def read() -> Iterator[tuple[str, torch.Tensor]]:
            for number, pair in enumerate(weights):
                if number == 3:
                    self._live(f"weights {type(self).loads}")
                yield pair

        type(self).loads += 1
        await super().load_weights(read())

    loads = 0

    async def close(self) -> None:
        self.is_closed = True
        await super().close()

    def _live(self, request_id: str) -> None:
        if not self.is_dead and self.deaths and request_id.startswith(self.deaths[0]):
            self.is_dead = True
            self.deaths.pop(0)
            if self.stop is not None:
                self.stop.requested = True
        if self.is_dead:
            raise SamplerDiedError("the engine has died")


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> type[Mortal]:
    class Made(Mortal):
        made: list[Mortal] = []  # noqa: RUF012
        deaths: list[str] = []  # noqa: RUF012

    monkeypatch.setattr(from_settings, "HfSampler", Made)
    connect_to(InMemoryClient(), monkeypatch)
    return Made


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainerConfig, Any]:
    """The undisturbed run, and its weights."""
    with pytest.MonkeyPatch.context() as patch:
        connect_to(InMemoryClient(), patch)
        config = configured(prepared(tmp_path_factory.mktemp("straight")), *ONCE)
        return config, run_through(config)


def assert_same(config: TrainerConfig, weights: Any, straight: tuple[TrainerConfig, Any]) -> None:
    for name, tensor in straight[1].items():
        assert torch.equal(weights[name], tensor), name
    for kind in ("step", "eval"):
        pair = [
            [
                {n: v for n, v in r.items() if not n.startswith(("seconds", "sync", "gen"))}
                for r in rs
            ]
            for rs in (records(config, kind), records(straight[0], kind))
        ]
        assert pair[0] == pair[1]


MOMENTS = ["step2-1", "eval-step2-1", "weights 4", "step0-3", "probe-2-1"]
"""A rollout, an evaluation, a sync; in the long round the first step and a probe too."""


@pytest.mark.parametrize(
    "moment",
    [
        *MOMENTS[:3],
        *(pytest.param(moment, marks=in_the_long_round) for moment in MOMENTS[3:]),
    ],
)
def test_a_run_whose_sampler_died_once_equals_one_whose_did_not(
    folder: Path,
    mortal: type[Mortal],
    straight: tuple[TrainerConfig, Any],
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    mortal.deaths[:] = [moment]
    config = configured(folder, *ONCE)
    weights = run_through(config)
    assert mortal.deaths == []
    assert [sampler.is_dead for sampler in mortal.made] == [True, False]
    assert all(sampler.is_closed for sampler in mortal.made)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning: the engine has died. Another one is started, once in a run") == 1
    assert_same(config, weights, straight)


def test_a_second_death_ends_the_run_with_both_named(folder: Path, mortal: type[Mortal]) -> None:
    mortal.deaths[:] = ["step1-0", "step3-2"]
    config = configured(folder, *ONCE)
    with pytest.raises(SamplerError, match=r"^the engine has died; one had died after step 1 al"):
        run_through(config)
    assert mortal.deaths == []
    assert [sampler.is_closed for sampler in mortal.made] == [True, True]
    assert [step["step"] for step in records(config, "step")] == [1, 2, 3]
    mortal.made.clear()
    run_through(config, resume=True)
    assert len(mortal.made) == 1


def test_the_checkpoint_that_a_run_went_on_from_need_not_be_there_any_more(
    folder: Path, mortal: type[Mortal], straight: tuple[TrainerConfig, Any]
) -> None:
    mortal.deaths[:] = ["step1-0", "step1-1"]
    config = configured(folder, *ONCE)
    with pytest.raises(SamplerError):
        run_through(config)
    mortal.deaths[:] = ["step3-2"]
    weights = run_through(config, resume=True)
    assert mortal.deaths == []
    assert [path.name for path in config.run.checkpoints.iterdir()] == ["step-000004"]
    assert mortal.made[-1]._path == str(config.run.checkpoints / "step-000003")
    assert_same(config, weights, straight)


@pytest.mark.parametrize(
    ("moment", "staleness"),
    [
        ("step2-3", 1),
        ("weights 4", 2),
        pytest.param("eval-step2", 1, marks=in_the_long_round),
    ],
)
def test_rollouts_ahead_of_the_learner_are_generated_again(
    folder: Path, mortal: type[Mortal], moment: str, staleness: int
) -> None:
    """Every step has its rollouts, none older than it may be, and each prompt in its turn."""
    mortal.deaths[:] = [moment]
    config = configured(folder, *ONCE, f"rollout.max_staleness={staleness}", "run.texts=6")
    run_through(config)
    assert mortal.deaths == []
    assert len(mortal.made) == 2
    steps = records(config, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["rollouts"] == 4 for step in steps)
    for step in steps:
        age = step["step"] - 1 - step["staleness_min_version"]
        assert 0 <= age <= staleness


def test_an_engine_that_a_signal_ended_too_is_not_started_again(
    folder: Path, mortal: type[Mortal]
) -> None:
    mortal.deaths[:] = ["step1-0"]
    stop = mortal.stop = StopRequest()
    with assembled(configured(folder, *ONCE), stop=stop) as run:
        with pytest.raises(Stopped):
            train(run)
        run.give_up()
    assert len(mortal.made) == 1


def test_one_of_several_processes_starts_none_alone(folder: Path, mortal: type[Mortal]) -> None:
    """The others would wait for it where it asks them for weights."""
    error = SamplerDiedError("the engine has died")

    def dies() -> None:
        raise error

    with assembled(configured(folder, *ONCE)) as run:
        one = replace(run, ranks=Ranks(rank=1, world=2))
        with pytest.raises(SamplerDiedError) as caught:
            one.restart.surviving(one, dies)
    assert caught.value is error
    assert len(mortal.made) == 1


@pytest.mark.parametrize("weights", ["shared", pytest.param("copied", marks=in_the_long_round)])
def test_a_batch_that_fails_is_begun_again_by_another_sampler(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """Alike to 1e-3 of a loss: whose rows are computed together is the clock's choice."""
    batched = (*ONCE, "run.steps=2", f'sampler={{"kind":"hf_batched","weights":"{weights}"}}')
    connect_to(InMemoryClient(), monkeypatch)
    expected = configured(folder, *batched, f"run.out={folder}/expected")
    run_through(expected)
    step, num_ended = RunningBatch.step, 0

    def failing(batch: RunningBatch) -> Any:
        nonlocal num_ended
        events = step(batch)
        before = num_ended
        num_ended += sum(
            delta.finish is not None and request.options.max_tokens == ROLLOUT_TOKENS
            for request, delta in events
        )
        if before < NUM_ENDED <= num_ended:
            raise RuntimeError("no memory")
        return events

    monkeypatch.setattr(RunningBatch, "step", failing)
    config = configured(folder, *batched)
    run_through(config)
    # Four of the first step; those of the second that had ended, and all of them.
    assert num_ended >= NUM_ENDED + 4
    for made, wanted in zip(records(config, "step"), records(expected, "step"), strict=True):
        assert made["kept_tokens"] == wanted["kept_tokens"]
        assert made["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
