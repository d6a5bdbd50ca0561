"""A real server around an engine that fails in one way:

python -m tests.faults.broken_teacher gate=PATH|dead=PATH|start|close|scores SETTINGS...

gate=PATH  no query is answered while the file is there
dead=PATH  the engine says that it is dead once the file is there
start      start() never returns, in a thread, and says that it has begun
close      close() never returns, in a thread, says that it has begun, and a child process stays
scores     the first query of the self-test is answered with other rows
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from teacher_server.access.auth import Access
from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.flags import add_flags
from teacher_server.process.app import TeacherApp
from teacher_server.process.loading import describe
from teacher_server.settings import load_config


class BrokenEngine(FakeEngine):
    """Fails as its name says."""

    def __init__(self, kind: str, path: Path) -> None:
        super().__init__()
        self._kind = kind
        self._path = path

    async def start(self) -> None:
        if self._kind == "start":
            print("starting", flush=True)  # noqa: T201
            await asyncio.to_thread(time.sleep, 600)
        if self._kind == "close":
            child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
            child.start()
            print(f"child {child.pid}", flush=True)  # noqa: T201

    async def score(self, query: ScoreQuery) -> EngineRows:
        while self._kind == "gate" and self._path.exists():
            await asyncio.sleep(0.02)
        rows = await super().score(query)
        if self._kind == "scores" and self.num_queries == 1:
            rows = replace(rows, token_logprobs=rows.token_logprobs - 1)
        return rows

    async def healthy(self) -> bool:
        return not (self._kind == "dead" and self._path.exists())

    async def close(self) -> None:
        if self._kind == "close":
            print("closing", flush=True)  # noqa: T201
            await asyncio.to_thread(time.sleep, 600)


async def _serve(kind: str, path: str, rest: list[str]) -> int:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    config, _ = load_config(vars(parser.parse_args(["--engine", "fake", *rest])), os.environ)
    engine = BrokenEngine(kind, Path(path))
    info = describe(config, engine, None)
    return await TeacherApp(config, engine, info, None, Access.from_config(config)).run()


def main(arguments: list[str]) -> int:
    """Serves until it ends; its exit code."""
    kind, _, path = arguments[0].partition("=")
    return asyncio.run(_serve(kind, path, arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
