"""The engine that generates, and the loop it lives on: started beside everything else, ended again.

An engine of vLLM takes tens of seconds, nearly all of them in a process of its own. So it is begun
as soon as nothing cheap can refuse any more, and waited for when it is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from student_trainer.assembly import from_settings
from student_trainer.recording.terminal import Bars
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.config import TrainerConfig
from vllm_process.children import has_engines

POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class RunningSampler:
    """A started engine and the loop it lives on; several runs may use it, one after another."""

    loop: LoopThread
    sampler: Sampler


def loop_on(device: torch.device) -> LoopThread:
    """A loop whose thread computes on this device: any thread begins with the machine's first."""
    loop = LoopThread()
    if device.type == "cuda":
        loop.run(_enter(device))
    return loop


async def _enter(device: torch.device) -> None:
    torch.cuda.set_device(device)


class SamplerStart:
    """A sampler that starts, or will; `close` frees it, however far it is."""

    def __init__(
        self, sampler: Sampler, loop: LoopThread, say: Callable[[str], None] = lambda how: None
    ) -> None:
        self._sampler = sampler
        self._loop = loop
        self._say = say
        self._started: Future[None] | None = None

    def begin(self) -> None:
        """Returns once the rest goes on by itself, in another process, or is done, or has failed.

        Until then it imports, and two threads that import the same packages may meet half of one.
        """
        if self._started is None:
            self._say("starting")
            self._started = self._loop.start(self._sampler.start())
        while not self._started.done() and not has_engines():
            time.sleep(POLL_S)

    def wait(self) -> None:
        """Raises what its start raises."""
        self.begin()
        if self._started is not None:
            self._loop.wait(self._started)
        self._say("ready")

    def close(self) -> None:
        if self._started is not None:
            self._started.cancel()
        self._loop.run(self._sampler.close())


@contextmanager
def begun(
    config: TrainerConfig, sampler: Sampler, loop: LoopThread, bars: Bars
) -> Iterator[SamplerStart]:
    """A sampler that starts while other things are done.

    On a GPU only when it is waited for: there vLLM takes a share of what it finds free, and the
    learner must have taken its own by then.
    """

    def say(how: str) -> None:
        done = how == "ready"
        bars.update("sampler", int(done), 1, how if done else f"{how} {config.sampler.kind}")

    with closing(SamplerStart(sampler, loop, say)) as start:
        if from_settings.device(config).type == "cpu":
            start.begin()
        yield start


@contextmanager
def started(sampler: Sampler, loop: LoopThread) -> Iterator[None]:
    """Starts the engine that generates, and frees it again."""
    with closing(SamplerStart(sampler, loop)) as start:
        start.wait()
        yield


@contextmanager
def running_sampler(config: TrainerConfig, model: str) -> Iterator[RunningSampler]:
    """A sampler on a loop of its own, for several runs or none."""
    sampler = from_settings.sampler(config, model)
    with closing(loop_on(from_settings.device(config))) as loop, started(sampler, loop):
        yield RunningSampler(loop, sampler)
