"""Ours: a teacher-server process, sessions over gRPC, a drift verdict with every reply."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack

from benchmarks.arms.base import Arm, Setup, Text
from benchmarks.processes import child, ready_file
from teacher_client.client import TeacherClient
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.records import DriftPolicy, LogprobDtype, ScoreOptions, TokenSpan

POLICY = DriftPolicy(metric=OverlapRatio(k=16, threshold=0.5), stop_in_flight=False)
"""Observes only: random candidates would stop every response at once."""


def server_command(setup: Setup, ready: str) -> list[str]:
    """A teacher server on free loopback ports."""
    flags = {
        "model": setup.model,
        "dtype": setup.dtype,
        "cpu-cores": setup.cores,
        "max-context": setup.max_context,
        "max-k": setup.k,
        "block-size": setup.block_size,
        "kv-cache-gib": setup.kv_cache_gib,
        "max-num-batched-tokens": setup.max_num_batched_tokens,
        "grpc-port": 0,
        "http-port": 0,
        "ready-file": ready,
        "log-level": "warning",
    }
    command = [sys.executable, "-m", "teacher_server.cli", "serve"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*command, "--enforce-eager"] if setup.eager else command


class Driftline(Arm):
    """Sessions with a drift policy and the student's top-k, log-probs as f16."""

    description = (
        "teacher-server process over gRPC: sessions with a drift policy, the student's top-k and "
        "the teacher's, f16; a response scored in one piece goes through the Score call"
    )

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._stack = ExitStack()
        self._client: TeacherClient | None = None
        self._options = ScoreOptions(k=setup.k, logprob_dtype=LogprobDtype.F16)
        self.address = ""

    async def start(self) -> None:
        path = ready_file()
        server = self._stack.enter_context(
            child("driftline", server_command(self.setup, str(path)))
        )
        await server.until(path.exists)
        self.address = json.loads(path.read_text())["grpc_address"]
        path.unlink()
        self._client = await TeacherClient.connect(
            [self.address],
            tokenizer_fingerprint="",
            vocab_size=self.setup.vocab_size,
            run_id="benchmark",
        )

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
        self._stack.close()

    async def grow(self, text: Text, pieces: list[tuple[int, int]]) -> int:
        assert self._client is not None
        if len(pieces) == 1:
            whole = span(text, *pieces[0])
            scores = await self._client.score(text.prompt_ids, whole, self._options, POLICY)
            return len(scores.rows)
        session = self._client.open(text.prompt_ids, self._options, POLICY)
        rows = 0
        for piece in pieces:
            scores = await session.append(span(text, *piece))
            rows += len(scores.rows)
        await session.close()
        return rows


def span(text: Text, start: int, end: int) -> TokenSpan:
    """A piece of a response as it is sent."""
    return TokenSpan(
        offset=start,
        token_ids=text.response_ids[start:end],
        candidate_ids=text.candidate_ids[start:end],
    )
