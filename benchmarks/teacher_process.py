"""A teacher with stored rows in a process of its own, whose CPU time can be read from outside.

python -m benchmarks.teacher_process --tokens 1024 --k 32 128
    prints the address, serves until standard input ends
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import uvloop

from benchmarks.provenance import ROOT


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server: where it listens and what it has cost so far."""

    address: str
    pid: int

    def cpu_s(self) -> float:
        """CPU time of all its threads (Linux: the process's own clock, read from here)."""
        return time.clock_gettime((~self.pid << 3) | 2)


@contextmanager
def server_process(module: str, arguments: Sequence[str]) -> Iterator[ServerProcess]:
    """Runs a module that prints its address and serves until its standard input ends."""
    paths = [str(ROOT), str(ROOT / "proto"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"{module} ended with {process.wait()} before it served")
        yield ServerProcess(address, process.pid)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


async def until_stdin_ends() -> None:
    """Returns when whoever started this process lets go of it."""
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def _serve(num_tokens: int, ks: list[int]) -> None:
    from benchmarks.stored_rows import StoredEngine, made_table
    from teacher_server.testing import local_teacher, teacher_info

    engine = StoredEngine({k: made_table(num_tokens, k) for k in ks})
    info = teacher_info(engine, max_sessions=4096)
    async with local_teacher(engine, info=info) as teacher:
        print(teacher.address, flush=True)
        await until_stdin_ends()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher_process")
    parser.add_argument("--tokens", type=int, required=True, help="rows a table")
    parser.add_argument("--k", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(arguments.tokens, arguments.k))


if __name__ == "__main__":
    main()
