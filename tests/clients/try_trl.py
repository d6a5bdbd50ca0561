"""`make test-clients`: TRL's own client, from its wheel in an environment of its own, reads what
Score gives.

The teacher is the playground's, by transformers. About half a minute where the environment is made.
Run: pytest tests/clients/try_trl.py
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.arms.trl_client import TrlAsking
from benchmarks.processes import child
from benchmarks.trainers.environment import CLIENT_FOLDER, TRL_CLIENT, made
from teacher_client.access import TeacherAccess
from teacher_client.client import TeacherClient
from teacher_wire.records import ScoreOptions, ScoreRows, TokenSpan

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "playground" / "checkpoints" / "teacher"
TOKEN = "x" * 43
K, PROMPT = 8, 20
WIRE = 1e-4
"""JSON writes float32 whole; the engine's sums may come in another order."""


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a teacher that asks for a token."""
    folder = tmp_path_factory.mktemp("teacher")
    tenants, ready = folder / "tenants.toml", folder / "ready.json"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    tenants.write_text(f'[tenants.trl]\ntoken_sha256 = ["{digest}"]\n')
    tenants.chmod(0o600)
    command = [sys.executable, "-m", "teacher_server.cli", "serve", "--engine", "hf"]
    command += ["--model", str(CHECKPOINT), "--tenants-file", str(tenants)]
    command += ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
    with child("test-clients", command) as server:
        asyncio.run(server.until(ready.exists))
        yield json.loads(ready.read_text())


def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 60, length).tolist() for length in (PROMPT + 90, PROMPT + 1, PROMPT + 40)
    ]


async def by_score(address: str, text: list[int], temperature: float) -> ScoreRows:
    client = await TeacherClient.connect(
        [address],
        tokenizer_fingerprint="",
        vocab_size=0,
        run_id="test",
        access=TeacherAccess(token=TOKEN),
    )
    ids = np.array(text, np.int32)
    span = TokenSpan(offset=0, token_ids=ids[PROMPT:])
    options = ScoreOptions(k=K, temperature=temperature, want_rank=True)
    scores = await client.score(ids[:PROMPT], span, options, None)
    await client.aclose()
    return scores.rows


async def asked(addresses: dict[str, str], questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What TRL makes of the answers; the token is the user of the URL."""
    trl = TrlAsking()
    await trl.start("test-clients-trl", f"http://{TOKEN}:@{addresses['http_address']}")
    try:
        return [await trl.ask(question) for question in questions]
    finally:
        await trl.close()


async def test_trl_reads_what_score_says(addresses: dict[str, str]) -> None:
    temperatures = (1.0, 0.7)
    questions = [
        {
            "sequences": texts(),
            "prompt_lengths": [PROMPT] * 3,
            "top_logprobs": K,
            "temperature": temperature,
            "chunk_size": chunk,
            "whole": True,
        }
        for temperature, chunk in zip(temperatures, (0, 1), strict=True)
    ]
    for temperature, answer in zip(temperatures, await asked(addresses, questions), strict=True):
        assert "error" not in answer
        for index, text in enumerate(texts()):
            rows = await by_score(addresses["grpc_address"], text, temperature)
            told = {name: np.array(values[index]) for name, values in answer.items()}
            np.testing.assert_array_equal(told["logprob_token_ids"], rows.topk_ids)
            np.testing.assert_allclose(told["logprobs"], rows.topk_logprobs, atol=WIRE)
            np.testing.assert_allclose(
                told["actual_logprobs"][:, 0], rows.token_logprobs, atol=WIRE
            )


async def test_trls_worker_reads_what_score_says(addresses: dict[str, str]) -> None:
    text = texts()[0]
    question = {"worker": [text[:PROMPT], text[PROMPT:]], "top_logprobs": K, "temperature": 0.7}
    (answer,) = await asked(addresses, [question])
    rows = await by_score(addresses["grpc_address"], text, 0.7)
    for ids, logprobs, top, token, own in zip(
        answer["ids"],
        answer["logprobs"],
        rows.topk_ids.tolist(),
        text[PROMPT:],
        rows.token_logprobs.tolist(),
        strict=True,
    ):
        assert ids == (top if token in top else [*top, token])
        assert logprobs[ids.index(token)] == pytest.approx(own, abs=WIRE)


def test_a_wrong_token_is_an_error_that_says_how(addresses: dict[str, str]) -> None:
    """Not a wait without end: /health is open, and the next question says what is wrong."""
    python = made(CLIENT_FOLDER, TRL_CLIENT, print)
    done = subprocess.run(
        [str(python), "-m", "benchmarks.arms.trl_child", f"http://{addresses['http_address']}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "Request failed: 401" in done.stderr
    assert "http://TOKEN:@HOST:PORT" in done.stderr
