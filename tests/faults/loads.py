"""Loads on a teacher and how to judge them: a server process, trainers that never stop asking."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from student_trainer.patience import RetryLimits
from student_trainer.teacher_client import TeacherClient
from teacher_wire.records import ScoreOptions, TokenSpan

START_S = 40.0
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
VOCAB = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherProcess:
    """A server process of the fake engine."""

    process: subprocess.Popen[bytes]
    grpc_address: str
    http_address: str

    def rss_bytes(self) -> int:
        """Memory that the process holds now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) << 10


@contextmanager
def teacher_process(folder: Path, *flags: str) -> Iterator[TeacherProcess]:
    """A server that is ready; it is ended on leaving."""
    ready_file = folder / f"ready-{time.monotonic_ns()}.json"
    command = [sys.executable, "-m", "teacher_server.cli", "serve", "--engine", "fake"]
    command += ["--grpc-port", "0", "--http-port", "0", "--no-self-test", "--drain-s", "1"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("TEACHER_")}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--ready-file", str(ready_file), *flags], env=env, stdout=log, stderr=log
        )
    try:
        give_up = time.monotonic() + START_S
        while not ready_file.exists():
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < give_up, "not ready in time"
            time.sleep(0.05)
        ready = json.loads(ready_file.read_text())
        yield TeacherProcess(
            process=process, grpc_address=ready["grpc_address"], http_address=ready["http_address"]
        )
    finally:
        process.kill()
        process.wait(timeout=10)


@dataclass(slots=True)
class Tally:
    """What one tenant got."""

    num_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of each append, as the trainer sees it."""

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 when all are equal, 1 / n when one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


@asynccontextmanager
async def tenant(address: str, name: str) -> AsyncIterator[TeacherClient]:
    """A trainer of that name, which waits as long as it is told to."""
    client = await TeacherClient.connect(
        [address],
        tokenizer_fingerprint="",
        vocab_size=VOCAB,
        run_id=name,
        connect_timeout_s=START_S,
        limits=RetryLimits(max_resends=5),
    )
    try:
        yield client
    finally:
        await client.aclose()


async def ask_without_pause(
    client: TeacherClient, tally: Tally, *, sessions: int, append_tokens: int, seconds: float
) -> None:
    """So many sessions side by side, each with its next append as soon as one is answered."""
    give_up = time.monotonic() + seconds
    ids = np.arange(append_tokens, dtype=np.int32) % VOCAB

    async def rollout() -> None:
        while time.monotonic() < give_up:
            session: Any = client.open(PROMPT, ScoreOptions(k=4), None)
            for index in range(32):
                started = time.monotonic()
                if started >= give_up:
                    break
                scores = await session.append(
                    TokenSpan(offset=index * append_tokens, token_ids=ids)
                )
                assert len(scores.rows) == append_tokens
                if time.monotonic() < give_up:
                    tally.num_tokens += append_tokens
                    tally.seconds.append(time.monotonic() - started)
            await session.close()

    await asyncio.gather(*(rollout() for _ in range(sessions)))
