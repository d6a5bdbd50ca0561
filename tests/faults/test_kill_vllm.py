"""kill -9 of a teacher on vLLM: its engine goes with it, and the next one gives the same rows.

Run: pytest tests/faults/test_kill_vllm.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest

from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import ScoreOptions
from teacher_wire.vocabulary import Vocabulary
from tests.cores import own_core
from tests.faults.engine_processes import children
from tests.faults.live_server import LiveServer
from tests.rounds import in_the_long_round
from tests.teacher.engine.engine_models import VOCAB_SIZE, byte_tokenizer, write_tiny_model
from tests.teacher.scoring.fake_rows import cut, make_span
from tests.waiting import LIMIT_S, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]

PROMPT = np.arange(7, 40, dtype=np.int32)
OPTIONS = ScoreOptions(k=16)
TOKENS, PIECE = 96, 24
NATS = 1e-5


def flags(folder: Path) -> list[str]:
    """Of a small teacher on vLLM."""
    model = write_tiny_model(folder / "model")
    words = f"--engine vllm --model {model} --max-context 192 --max-k 16 --kv-cache-gib 0.05"
    return [*words.split(), "--enforce-eager", "--no-self-test", "--cpu-cores", own_core()]


def killed_with_its_engine(server: LiveServer) -> None:
    """The server alone is killed, and nothing else of its group."""
    engine = children(server.process.pid)
    assert engine
    server.process.kill()
    wait_until(lambda: not any(process.exists() for process in engine))


def check_tokens(address: str) -> None:
    """A real server tells the tokens of its checkpoint."""
    own = Vocabulary.of(byte_tokenizer())
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.TeacherServiceStub(channel)
        info = stub.GetInfo(pb.GetInfoRequest(), timeout=LIMIT_S).info
        asked = pb.GetTokensRequest(first_id=0, count=VOCAB_SIZE)
        reply = stub.GetTokens(asked, timeout=LIMIT_S)
    assert (info.tokenizer_fingerprint, tuple(info.token_digests)) == (own.fingerprint, own.digests)
    assert dict(zip(reply.ids, reply.tokens, strict=True)) == own.named(0, VOCAB_SIZE)


def test_the_engine_goes_with_its_teacher(tmp_path: Path) -> None:
    server = LiveServer(tmp_path, *flags(tmp_path), forked=False)
    try:
        server.wait_until_ready()
        check_tokens(server.address)
        killed_with_its_engine(server)
    finally:
        server.end()


@in_the_long_round
def test_the_next_one_gives_the_same_rows(tmp_path: Path) -> None:
    arguments = flags(tmp_path)
    servers = [LiveServer(tmp_path, *arguments, forked=False)]
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
        await asyncio.to_thread(killed_with_its_engine, servers[0])
        again = LiveServer(tmp_path, *arguments, "--grpc-port", str(servers[0].port), forked=False)
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
