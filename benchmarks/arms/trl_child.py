"""TRL's own client, in an environment that has TRL and nothing of ours.

    python -m benchmarks.arms.trl_child URL

answers each question that it reads, one JSON object a line: {sequences, prompt_lengths,
top_logprobs, temperature} as VLLMClient.get_sequence_logprobs takes them. With "whole" it answers
all that the client has made of the reply, else the number of rows. "worker" in place of
"prompt_lengths" asks as TRL's asynchronous worker does.

TRL takes vLLM for its weight synchronisation alone, which a teacher has no part in, and refuses to
make a client without it. It is told that vLLM is not there while it imports, and that it is when
the client asks; everything else is TRL's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from importlib import metadata
from typing import Any

import trl.import_utils as trl_imports


def _client(url: str) -> Any:
    trl_imports.is_vllm_available = lambda min_version=None: False
    from trl.generation import vllm_client

    vllm_client.is_vllm_available = lambda min_version=None: True
    return vllm_client.VLLMClient(base_url=url, connection_timeout=30.0)


async def _as_worker(url: str, model: str, question: dict[str, Any]) -> dict[str, Any]:
    """As TRL's worker asks for one text, with what it needs of itself for that and no more."""
    import aiohttp
    from trl.experimental.async_distillation.async_rollout_worker import _AsyncRolloutLoop

    loop: Any = object.__new__(_AsyncRolloutLoop)
    loop.teacher_temperature = question["temperature"]
    loop.teacher_top_k = question["top_logprobs"]
    loop.request_timeout = 600.0
    prompt_ids, completion_ids = question["worker"]
    async with aiohttp.ClientSession() as session:
        loop.session = session
        ids, logprobs = await loop._score_with_teacher(prompt_ids, completion_ids, url, model)
    return {"ids": ids, "logprobs": logprobs}


def main(url: str) -> None:
    # Libraries print; only answers may stand on the standard output that the other end reads.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    client = _client(url)
    say({"ready": True, "trl": metadata.version("trl"), "model": client.model})
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "worker" in question:
                say(asyncio.run(_as_worker(url, client.model, question)))
                continue
            is_whole = question.pop("whole", False)
            made = client.get_sequence_logprobs(**question)
            say(made if is_whole else {"rows": sum(map(len, made["logprobs"]))})
        except Exception as error:  # noqa: BLE001 - the other end shows it
            say({"error": f"{type(error).__name__}: {error}"[:500]})


if __name__ == "__main__":
    main(sys.argv[1])
