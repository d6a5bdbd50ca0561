"""An arm in a process of its own: engines that are libraries, with what they do to a process.

python -m benchmarks.arms.worker ARM SETUP-AS-JSON
    answers each job that it reads with an outcome; one JSON object a line
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from benchmarks.arms.base import Arm, Job, Outcome, Setup
from benchmarks.arms.vllm_server import on_cores, vllm_environment
from benchmarks.processes import Answering, answer_lines

CACHED = "vllm_library_cached_b"
"""Followed by the block size."""


class Worker(Arm):
    """Passes jobs on to the process that has the arm, which also has the clock."""

    def __init__(self, name: str, setup: Setup, description: str) -> None:
        super().__init__(setup)
        self.description = description
        self._name = name
        self._process = Answering()

    async def start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.arms.worker", self._name]
        command.append(json.dumps(asdict(self.setup)))
        env = vllm_environment(self.setup)
        await self._process.start(self._name, on_cores(self.setup, command), env)

    async def close(self) -> None:
        await self._process.close()

    async def run(self, job: Job) -> Outcome:
        return Outcome(**await self._process.ask(asdict(job)))


def library_arm(name: str, setup: Setup) -> Arm:
    """The arm itself; imports its library."""
    from benchmarks.arms.vllm_library import Floor, VllmLibraryCached

    if name == "floor":
        return Floor(setup)
    if name.startswith(CACHED):
        return VllmLibraryCached(setup, int(name.removeprefix(CACHED)))
    from benchmarks.arms.reference import Transformers

    return Transformers(setup)


@asynccontextmanager
async def _working(
    name: str, setup: Setup
) -> AsyncIterator[Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]:
    arm = library_arm(name, setup)

    async def answer(job: dict[str, Any]) -> dict[str, Any]:
        return asdict(await arm.run(Job(**job)))

    try:
        await arm.start()
        yield answer
    finally:
        await arm.close()


if __name__ == "__main__":
    asyncio.run(answer_lines(_working(sys.argv[1], Setup(**json.loads(sys.argv[2])))))
