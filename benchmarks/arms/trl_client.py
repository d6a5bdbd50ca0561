"""TRL's client, whose every request carries the whole prefix: against our server, which keeps the
rows of what it has scored, and against vLLM's, which makes them anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from benchmarks.arms.base import Arm, Setup, Text
from benchmarks.arms.driftline import server_command
from benchmarks.arms.vllm_server import VllmServer
from benchmarks.processes import Answering, child, ready_file
from benchmarks.trainers.environment import CLIENT_FOLDER, TRL_CLIENT, made


class TrlAsking:
    """TRL's client in its own environment, which is made if it is not there."""

    def __init__(self) -> None:
        self._process = Answering()

    async def start(self, name: str, url: str, env: Mapping[str, str] | None = None) -> None:
        """Returns once the client has found its server."""
        python = made(CLIENT_FOLDER, TRL_CLIENT, lambda _: None)
        command = [str(python), "-m", "benchmarks.arms.trl_child", url]
        await self._process.start(name, command, {"HF_HUB_OFFLINE": "1", **(env or {})})

    async def close(self) -> None:
        await self._process.close()

    async def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What benchmarks.arms.trl_child answers."""
        return await self._process.ask(question)

    async def score(self, text: Text, start: int, end: int, k: int) -> int:
        """The rows of response tokens start..end, as TRL makes them of the reply."""
        question = {
            "sequences": [text.upto(end).tolist()],
            "prompt_lengths": [len(text.prompt_ids) + start],
            "top_logprobs": k,
            "temperature": 1.0,
        }
        return int((await self.ask(question))["rows"])


class TrlClient(Arm):
    """Against us."""

    description = (
        "TRL's own VLLMClient.get_sequence_logprobs, in an environment of its own, against our "
        "teacher-server's POST /v1/completions: the whole prefix in every request and the rows of "
        "the whole prefix in every answer, of which the client parses the new ones"
    )

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._stack = ExitStack()
        self._client = TrlAsking()

    async def start(self) -> None:
        path = ready_file()
        server = self._stack.enter_context(
            child("trl_client", server_command(self.setup, str(path)))
        )
        await server.until(path.exists)
        address = json.loads(path.read_text())["http_address"]
        path.unlink()
        await self._client.start("trl_client_child", f"http://{address}")

    async def close(self) -> None:
        await self._client.close()
        self._stack.close()

    async def score(self, text: Text, start: int, end: int) -> int:
        return await self._client.score(text, start, end, self.setup.k)


class TrlClientVllm(VllmServer):
    """Against vLLM's server."""

    description = (
        "the same client against vLLM's OpenAI server, --max-logprobs -1, its own block size: the "
        "same requests"
    )

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._client = TrlAsking()

    async def start(self) -> None:
        await super().start()
        await self._client.start("trl_client_vllm_child", self.base_url)

    async def close(self) -> None:
        await self._client.close()
        await super().close()

    async def score(self, text: Text, start: int, end: int) -> int:
        return await self._client.score(text, start, end, self.setup.k)
