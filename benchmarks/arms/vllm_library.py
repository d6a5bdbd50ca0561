"""vLLM as a library, without its server: its best hidden setting, and the floor."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.arms.base import Arm, Setup, Text
from vllm_process.cores import IN_ENGINE_CORE

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine.async_llm import AsyncLLM


class VllmLibrary(Arm):
    """An AsyncLLM whose model runs in an engine-core process."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._llm: AsyncLLM | None = None
        self._request_ids = itertools.count()

    def engine_arguments(self) -> dict[str, Any]:
        """Of this arm, beyond those that all share."""
        return {}

    async def start(self) -> None:
        await asyncio.to_thread(self._build)

    def _build(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        in_core = self.setup.cores != "auto" and self.setup.vllm_executor == "core"
        arguments: dict[str, Any] = {
            "model": self.setup.model,
            "dtype": self.setup.dtype,
            "skip_tokenizer_init": True,
            "max_model_len": self.setup.max_context,
            "max_num_batched_tokens": self.setup.max_num_batched_tokens,
            "kv_cache_memory_bytes": int(self.setup.kv_cache_gib * 2**30),
            "enforce_eager": self.setup.eager,
            "distributed_executor_backend": IN_ENGINE_CORE if in_core else None,
            "disable_log_stats": True,
            "enable_log_requests": False,
        }
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments | self.engine_arguments())
        )

    async def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    def live(self) -> tuple[AsyncLLM, str]:
        """The engine and a name for the next request."""
        assert self._llm is not None
        return self._llm, str(next(self._request_ids))


class VllmLibraryCached(VllmLibrary):
    """prompt_logprobs with everything hidden turned on."""

    def __init__(self, setup: Setup, block_size: int) -> None:
        super().__init__(setup)
        self._block_size = block_size

    def engine_arguments(self) -> dict[str, Any]:
        return {
            "block_size": self._block_size,
            "enable_prefix_caching": True,
            "max_logprobs": -1,
        }

    async def score(self, text: Text, start: int, end: int) -> int:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.logprobs import FlatLogprobs

        llm, request_id = self.live()
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self.setup.k,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=False,
        )
        prompt = TokensPrompt(prompt_token_ids=text.upto(end).tolist())
        last = None
        async for output in llm.generate(prompt, params, request_id):
            last = output
        assert last is not None
        self.count("cached_tokens", last.num_cached_tokens or 0)
        assert isinstance(last.prompt_logprobs, FlatLogprobs)
        return flat_rows(last.prompt_logprobs, len(text.prompt_ids) + start, self.setup.k)


def flat_rows(flat: FlatLogprobs, first: int, k: int) -> int:
    """Top-K ids and log-probs of positions first.. as arrays; their number.

    Each position has the actual token first, then the top-K.
    """
    begin = flat.start_indices[first]
    ids_nX = np.array(flat.token_ids[begin:], dtype=np.int64).reshape(-1, k + 1)
    logprobs_nX = np.array(flat.logprobs[begin:], dtype=np.float32).reshape(-1, k + 1)
    assert ids_nX.shape == logprobs_nX.shape
    return len(ids_nX[:, 1:])


class Floor(VllmLibrary):
    """The forward pass and nothing else; counts the rows that it could have scored."""

    def engine_arguments(self) -> dict[str, Any]:
        from vllm.config import PoolerConfig

        return {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": PoolerConfig(pooling_type="LAST", use_activation=False),
            "block_size": self.setup.block_size,
            "enable_prefix_caching": False,
            "enable_chunked_prefill": True,
        }

    async def grow(self, text: Text, pieces: list[tuple[int, int]]) -> int:
        return await self.score(text, 0, pieces[-1][1])

    async def score(self, text: Text, start: int, end: int) -> int:
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        llm, request_id = self.live()
        prompt = TokensPrompt(prompt_token_ids=text.upto(end).tolist())
        async for output in llm.encode(prompt, PoolingParams(task="embed"), request_id):
            assert output.finished
        return end - start
