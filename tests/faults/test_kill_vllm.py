"""kill -9 of a teacher on vLLM: its engine goes with it, and the next one gives the same rows.

Run: pytest tests/faults/test_kill_vllm.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_wire.records import ScoreOptions
from tests.cores import own_core
from tests.faults.engine_processes import children
from tests.faults.live_server import LiveServer
from tests.teacher.engine.engine_models import VOCAB_SIZE, write_tiny_model
from tests.teacher.scoring.fake_rows import cut, make_span
from tests.waiting import LIMIT_S, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]

PROMPT = np.arange(7, 40, dtype=np.int32)
OPTIONS = ScoreOptions(k=16)
TOKENS, PIECE = 96, 24
NATS = 1e-5


def test_the_engine_goes_with_its_teacher_and_the_next_one_gives_the_same_rows(
    tmp_path: Path,
) -> None:
    model = write_tiny_model(tmp_path / "model")
    flags = ["--engine", "vllm", "--model", str(model), "--max-context", "192", "--max-k", "16"]
    flags += [
        "--kv-cache-gib",
        "0.05",
        "--enforce-eager",
        "--cpu-cores",
        own_core(),
        "--no-self-test",
    ]
    servers = [LiveServer(tmp_path, *flags, forked=False)]
    span = make_span(TOKENS)

    async def scenario() -> None:
        servers[0].wait_until_ready()
        client = await TeacherClient.connect(
            [servers[0].address],
            tokenizer_fingerprint="",
            vocab_size=VOCAB_SIZE,
            run_id="test",
            connect_timeout_s=LIMIT_S,
            on_absent="wait",
            limits=RetryLimits(max_resends=1000),
        )
        pieces = [cut(span, start, start + PIECE) for start in range(0, TOKENS, PIECE)]
        undisturbed, killed = (client.open(PROMPT, OPTIONS, None) for _ in range(2))
        expected = [await undisturbed.append(piece) for piece in pieces]
        answers = [await killed.append(pieces[0])]
        engine = children(servers[0].process.pid)
        assert engine
        servers[0].process.kill()  # and nothing else of its group
        await eventually(lambda: not any(process.exists() for process in engine))
        again = LiveServer(tmp_path, *flags, "--grpc-port", str(servers[0].port), forked=False)
        servers.append(again)
        await asyncio.to_thread(again.wait_until_ready)
        answers += [await killed.append(piece) for piece in pieces[1:]]
        await client.aclose()
        for answer, other in zip(answers, expected, strict=True):
            np.testing.assert_array_equal(answer.rows.topk_ids, other.rows.topk_ids)
            for name in ("topk_logprobs", "token_logprobs", "candidate_logprobs"):
                np.testing.assert_allclose(
                    getattr(answer.rows, name), getattr(other.rows, name), rtol=0, atol=NATS
                )

    try:
        asyncio.run(scenario())
    finally:
        for server in servers:
            server.end()
