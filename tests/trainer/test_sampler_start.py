"""A sampler starts beside everything else: begun first, waited for last, ended whatever happens.

Run: python -m pytest tests/trainer/test_sampler_start.py. With vLLM: faults/test_engine_at_start.py
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from student_trainer.assembly import from_settings
from student_trainer.assembly.run import Run
from student_trainer.assembly.sampling import RunningSampler, SamplerStart, loop_on, started
from student_trainer.errors import SamplerDiedError, SamplerError
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.config import load_config
from tests.trainer.in_memory import InMemorySampler
from tests.trainer.settings.smallest_config import SMALLEST
from tests.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.timeout(LIMIT_S)


class Slow(InMemorySampler):
    """Starts once it may; its engine, if it has one, is a process."""

    def __init__(self, engine: BaseProcess | None = None) -> None:
        super().__init__()
        self.engine, self.may_start = engine, asyncio.Event()
        self.done: list[str] = []

    async def start(self) -> None:
        if self.engine:
            self.engine.start()
        try:
            await self.may_start.wait()
        except asyncio.CancelledError:
            self.done.append("cancelled")
            raise
        self.done.append("started")

    async def close(self) -> None:
        self.done.append("closed")


class Refusing(InMemorySampler):
    """Does not start."""

    async def start(self) -> None:
        raise SamplerError("cannot generate")


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    with closing(LoopThread()) as made:
        yield made


@pytest.fixture
def engine() -> Iterator[BaseProcess]:
    """A process that multiprocessing knows by the name that vLLM gives its own."""
    process = multiprocessing.get_context("spawn").Process(
        target=time.sleep, args=(LIMIT_S,), name="EngineCore_DP0", daemon=True
    )
    yield process
    if process.pid is not None:
        process.kill()
        process.join()


def test_it_is_left_alone_once_its_process_runs_and_waited_for_in_the_end(
    loop: LoopThread, engine: BaseProcess
) -> None:
    sampler, said = Slow(engine), list[str]()
    with closing(SamplerStart(sampler, loop, said.append)) as start:
        start.begin()
        assert engine.is_alive()
        assert (sampler.done, said) == ([], ["starting"])

        async def release() -> None:
            sampler.may_start.set()

        loop.run(release())
        start.wait()
        assert (sampler.done, said) == (["started"], ["starting", "ready"])
    assert sampler.done == ["started", "closed"]


def test_one_that_is_ended_before_it_has_started_is_cancelled_and_closed(
    loop: LoopThread, engine: BaseProcess
) -> None:
    sampler = Slow(engine)
    with closing(SamplerStart(sampler, loop)) as start:
        start.begin()
    wait_until(lambda: len(sampler.done) == 2)
    assert {*sampler.done} == {"cancelled", "closed"}


def test_one_that_was_never_begun_is_closed(loop: LoopThread) -> None:
    sampler = Slow()
    SamplerStart(sampler, loop).close()
    assert sampler.done == ["closed"]


def test_what_it_fails_with_waits_for_those_that_come_first(loop: LoopThread) -> None:
    """A learner that cannot be loaded is told of before a sampler that cannot."""
    start = SamplerStart(Refusing(), loop)
    start.begin()
    with pytest.raises(SamplerError, match="cannot generate"):
        start.wait()
    start.close()
    with pytest.raises(SamplerError), started(Refusing(), loop):
        pytest.fail("it has not started")


def test_the_loop_of_a_process_computes_on_the_device_that_the_process_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread begins with the machine's first GPU, and "cuda" there is that one."""
    path, entered = tmp_path / "smallest.toml", list[tuple[str, torch.device]]()
    path.write_text(SMALLEST)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda to: entered.append((threading.current_thread().name, to))
    )
    device = from_settings.device(load_config(path))
    assert device == torch.device("cuda", 3)
    with closing(loop_on(device)):
        pass
    assert entered == [("rollouts", device)]


@pytest.mark.parametrize("level", [0, 1])
def test_it_sleeps_while_the_learner_learns_only_where_the_settings_say_so(
    level: int, tmp_path: Path
) -> None:
    class Sleeping(InMemorySampler):
        naps = 0

        async def sleep(self) -> None:
            self.naps += 1
            raise SamplerDiedError("is replaced where it is to have weights")

    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST)
    config = load_config(path, [f"sampler.sleep_level={level}"])
    sampler = Sleeping()
    with closing(loop_on(torch.device("cpu"))) as loop:
        run: Any = SimpleNamespace(config=config, running=RunningSampler(loop, sampler))
        Run._give_the_gpu_to_the_learner(run)
    assert sampler.naps == level
