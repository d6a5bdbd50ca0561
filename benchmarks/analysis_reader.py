"""Somebody who analyses one response after the other, in a process of its own.

python -m benchmarks.analysis_reader HTTP_ADDRESS VOCABULARY K
    answers each question {"path": ..., "tokens": ..., "until": FILE} with the times at which it was
    answered until the file was there, seconds of the monotonic clock; one JSON object a line
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.arms.base import Job, Text, made_texts

PROMPT_TOKENS = 16


def one_text(tokens: int, *, vocab_size: int, k: int, seed: int = 0) -> Text:
    """A response of so many random tokens, with candidates."""
    job = Job(seed=seed, prompt=PROMPT_TOKENS, response=tokens, piece=tokens)
    return made_texts(job, vocab_size=vocab_size, k=k)[0]


def body_of(text: Text, path: str, k: int) -> dict[str, Any]:
    """The request for its rows at this path: /v1/analyze as JSON, /v1/score packed."""
    body: dict[str, Any] = {
        "prompt_ids": text.prompt_ids.tolist(),
        "response_ids": text.response_ids.tolist(),
        "candidate_ids": text.candidate_ids.tolist(),
        "k": k,
    }
    return body if path == "/v1/analyze" else body | {"encoding": "base64"}


@asynccontextmanager
async def _connected(
    address: str, vocab_size: int, k: int
) -> AsyncIterator[Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]:
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=600.0) as client:

        async def answer(question: dict[str, Any]) -> dict[str, Any]:
            path, until = question["path"], Path(question["until"])
            text = one_text(question["tokens"], vocab_size=vocab_size, k=k)
            content = json.dumps(body_of(text, path, k))
            headers: dict[str, str] = {"content-type": "application/json"}
            answered: list[float] = []
            while not until.exists():
                reply = await client.post(path, content=content, headers=headers)
                if reply.status_code != 429:
                    reply.raise_for_status()
                    answered.append(time.monotonic())
            return {"answered": answered}

        yield answer


if __name__ == "__main__":
    from benchmarks.processes import answer_lines

    where, size, width = sys.argv[1:]
    asyncio.run(answer_lines(_connected(where, int(size), int(width))))
