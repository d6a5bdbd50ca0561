"""vLLM's own server over HTTP: as everybody uses it, and with what it hides.

Every request carries the whole prefix and asks for the log-probs of the whole prefix: the protocol
has no other way. The client keeps the rows of the new tokens, as numpy arrays.
"""

from __future__ import annotations

import base64
import io
import socket
import sys
from contextlib import ExitStack
from typing import Any, ClassVar

import httpx
import numpy as np

from benchmarks.arms.base import Arm, Setup, Text
from benchmarks.processes import child
from vllm_process.cores import IN_ENGINE_CORE

REQUEST_LIMIT_S = 1200.0


def vllm_environment(setup: Setup) -> dict[str, str]:
    """Threads on the given cores; "auto" leaves the choice to vLLM."""
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    if setup.cores == "auto":
        return env
    env["OMP_NUM_THREADS"] = str(len(setup.cores.split(",")))
    if setup.vllm_executor == "default":
        env["VLLM_CPU_OMP_THREADS_BIND"] = setup.cores
    return env


def on_cores(setup: Setup, command: list[str]) -> list[str]:
    """The command, kept to the cores of the setup."""
    return command if setup.cores == "auto" else ["taskset", "-c", setup.cores, *command]


class VllmServer(Arm):
    """A server process; subclasses say how rows are asked for."""

    block_size: int | None = None
    """None is vLLM's own choice."""
    environment: ClassVar[dict[str, str]] = {}

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._stack = ExitStack()
        self._http: httpx.AsyncClient | None = None
        self.base_url = ""
        """Of the server, once it is up."""

    def _command(self, port: int) -> list[str]:
        # The module behind `vllm serve`: the command itself does not start with the CPU wheel,
        # whose distribution has another name than it looks for.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        flags: dict[str, Any] = {
            "model": self.setup.model,
            "dtype": self.setup.dtype,
            "served-model-name": "teacher",
            "host": "127.0.0.1",
            "port": port,
            "max-logprobs": -1,
            "max-model-len": self.setup.max_context,
            "max-num-batched-tokens": self.setup.max_num_batched_tokens,
            "kv-cache-memory-bytes": int(self.setup.kv_cache_gib * 2**30),
        }
        if self.block_size is not None:
            flags["block-size"] = self.block_size
        if self.setup.cores != "auto" and self.setup.vllm_executor == "core":
            flags["distributed-executor-backend"] = IN_ENGINE_CORE
        command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        # The last two: /inference/v1/generate, and the number of cached tokens in replies.
        command += ["--enable-scale-out", "--enable-prompt-tokens-details"]
        return [*command, "--enforce-eager"] if self.setup.eager else command

    async def start(self) -> None:
        port = _free_port()
        env = vllm_environment(self.setup) | self.environment
        server = self._stack.enter_context(
            child(type(self).__name__, on_cores(self.setup, self._command(port)), env=env)
        )
        self.base_url = base = f"http://127.0.0.1:{port}"
        await server.until(lambda: _healthy(base))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=base, timeout=REQUEST_LIMIT_S, limits=limits, trust_env=False
        )

    async def close(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()
        self._stack.close()

    async def generate(self, text: Text, end: int, **sampling: object) -> dict[str, Any]:
        """POST /inference/v1/generate, which takes whole sampling parameters."""
        sampling |= {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        body = {"token_ids": text.upto(end).tolist(), "sampling_params": sampling}
        return await self.post("/inference/v1/generate", body)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A reply; counts its bytes and the tokens that were not computed again."""
        assert self._http is not None
        reply = await self._http.post(path, json=body)
        if reply.status_code != 200:
            raise RuntimeError(f"{path} answers {reply.status_code}: {_message(reply)}")
        self.count("bytes", len(reply.content))
        content: dict[str, Any] = reply.json()
        details = content["usage"].get("prompt_tokens_details") or {}
        self.count("cached_tokens", details.get("cached_tokens") or 0)
        return content


class VllmOpenai(VllmServer):
    """POST /v1/completions with prompt_logprobs."""

    description = (
        "vLLM's OpenAI server, --max-logprobs -1, its own block size: POST /v1/completions with "
        "the prefix's token ids, prompt_logprobs=K, max_tokens=1; JSON parsed, new rows to numpy"
    )

    async def score(self, text: Text, start: int, end: int) -> int:
        body = {
            "model": "teacher",
            "prompt": text.upto(end).tolist(),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.setup.k,
        }
        content = await self.post("/v1/completions", body)
        rows = content["choices"][0]["prompt_logprobs"]
        return parsed_rows(rows[len(text.prompt_ids) + start :], self.setup.k)


class VllmOpenaiCached(VllmServer):
    """The same server with the prefix cache forced on."""

    block_size = 32
    description = (
        "the same server, block size 32, POST /inference/v1/generate (--enable-scale-out), the "
        "only endpoint that passes skip_reading_prefix_cache=False on; no detokenisation. Rows "
        "whose tokens were cached are uninitialised memory: also the first of a piece that "
        "follows a whole block"
    )

    async def score(self, text: Text, start: int, end: int) -> int:
        content = await self.generate(
            text, end, prompt_logprobs=self.setup.k, skip_reading_prefix_cache=False
        )
        rows = content["prompt_logprobs"]
        return parsed_rows(rows[len(text.prompt_ids) + start :], self.setup.k)


class VllmTokenIds(VllmServer):
    """Log-probs at candidate ids alone, as an .npy in base64."""

    environment: ClassVar[dict[str, str]] = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    description = (
        "vLLM's server with its V2 model runner: POST /inference/v1/generate with "
        "prompt_logprob_token_ids (the student's top-k of the new rows) and prompt_logprob_start; "
        "no teacher top-k, no prefix cache"
    )

    async def score(self, text: Text, start: int, end: int) -> int:
        content = await self.generate(
            text,
            end,
            prompt_logprob_token_ids=text.candidate_ids[start:end].tolist(),
            prompt_logprob_start=len(text.prompt_ids) + start - 1,
        )
        packed = content["prompt_token_id_logprobs"]
        if packed is None:
            raise RuntimeError("the reply has no prompt_token_id_logprobs")
        return len(np.load(io.BytesIO(base64.b64decode(packed))))


def parsed_rows(rows: list[dict[str, dict[str, float]]], k: int) -> int:
    """Top-K ids and log-probs of JSON rows as arrays, which is what a trainer needs; their number.

    Each row has the actual token first, then the top-K; the two may coincide.
    """
    ids_nK = np.zeros((len(rows), k), dtype=np.int64)
    logprobs_nK = np.full((len(rows), k), -np.inf, dtype=np.float32)
    for row, entries in enumerate(rows):
        top = [item for item in entries.items() if item[1]["rank"] <= k][:k]
        ids_nK[row, : len(top)] = [int(token_id) for token_id, _ in top]
        logprobs_nK[row, : len(top)] = [entry["logprob"] for _, entry in top]
    return len(ids_nK)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(base: str) -> bool:
    try:
        return httpx.get(f"{base}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:200]
