"""Servers and workers of a benchmark: each in a process group of its own, ended with the benchmark.

Their environment is the one the benchmark was started with, not what libraries made of it since.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT
from examples.demo import process

LOGS = ROOT / "runs" / "bench-logs"
START_LIMIT_S = 900.0
"""A first start compiles the model."""
END_LIMIT_S = 20.0
_STARTED_WITH = {key: value for key, value in os.environ.items() if not key.startswith("TEACHER_")}
_ERROR = re.compile(r"(?i)\berror\b|\w+Error\b")
_NOISE = re.compile(r"For further information|Traceback|WARNING|raise |errors\.pydantic")


class StartError(Exception):
    """A process did not become ready."""


class Child:
    """A running process and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    async def until(self, ready: Callable[[], bool], limit_s: float = START_LIMIT_S) -> None:
        """Returns once `ready`; raises StartError with what the log says when that fails."""
        give_up = asyncio.get_running_loop().time() + limit_s
        while not await asyncio.to_thread(ready):
            if self.process.poll() is not None:
                raise StartError(f"{what_failed(self.log)} (exit code {self.process.returncode})")
            if asyncio.get_running_loop().time() > give_up:
                raise StartError(f"not ready after {limit_s:.0f} s: {what_failed(self.log)}")
            await asyncio.sleep(0.2)


@contextmanager
def child(
    name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Child]:
    """A process from the root of the repository; its output goes to a log unless options say."""
    LOGS.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), str(ROOT / "proto"), _STARTED_WITH.get("PYTHONPATH", "")]
    environment = _STARTED_WITH | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log = LOGS / f"{name}.log"
    with log.open("w") as stream:
        streams: dict[str, Any] = {"stdout": stream, "stderr": stream} | options
        with process(command, cwd=ROOT, env=environment | dict(env or {}), **streams) as started:
            yield Child(started, log)


def what_failed(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line) and not _NOISE.search(line)]
    # pydantic goes on with the whole input.
    return (errors or lines or ["nothing in the log"])[-1].partition(" [type=")[0][:300]


class Answering:
    """A child that answers each line of its standard input with one; both are JSON objects."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._child: Child | None = None
        self._listens = False

    async def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        """Returns once it has said that it is ready. Raises StartError."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._child = self._stack.enter_context(child(name, command, env=env, **pipes))
        async with asyncio.timeout(START_LIMIT_S):
            await self._answer()
        self._listens = True

    @property
    def pid(self) -> int:
        """Of the process. Only while it runs."""
        assert self._child is not None
        return self._child.process.pid

    async def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer. Raises RuntimeError with the error it answers, StartError when it is gone."""
        assert self._child is not None
        stdin = self._child.process.stdin
        assert stdin is not None
        stdin.write(json.dumps(question).encode() + b"\n")
        stdin.flush()
        return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._child is not None
        stdout = self._child.process.stdout
        assert stdout is not None
        line = await asyncio.to_thread(stdout.readline)
        if not line:
            raise StartError(f"the process ended: {what_failed(self._child.log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    async def close(self) -> None:
        """The end of its input is how it is asked to end; being killed is for those that do not."""
        ending, self._child = self._child, None
        if ending is None:
            return
        process = ending.process
        with suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        if self._listens:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, END_LIMIT_S)
        self._stack.close()
        process.stdout.close()  # type: ignore[union-attr]


async def answer_lines(
    work: AbstractAsyncContextManager[Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]],
) -> None:
    """The other end of Answering, for a child's main: answers with what the work returns."""
    # Libraries print; only answers may stand on the standard output that the other end reads.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def say(content: dict[str, Any]) -> None:
            print(json.dumps(content), file=answers, flush=True)

        async with work as answer:
            say({"ready": True})
            while line := await asyncio.to_thread(sys.stdin.readline):
                try:
                    say(await answer(json.loads(line)))
                except Exception as error:  # noqa: BLE001 - the other end shows it in its table
                    say({"error": first_line(error)})


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def ready_file() -> Path:
    """A path that nothing is at yet, for a server to say that it is ready."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"ready-{os.getpid()}.json"
    path.unlink(missing_ok=True)
    return path


def run(main: Coroutine[Any, Any, int]) -> int:
    """Runs a benchmark; SIGTERM and SIGINT cancel it, so that what it started is ended."""

    async def guarded() -> int:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await main

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        return 130
