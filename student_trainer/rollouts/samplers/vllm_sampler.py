"""Student rollouts with vLLM: one request a rollout, the student's top-k with every token.

The behavior log-probs are `processed_logprobs`: those of the distribution that was sampled from,
after temperature and top-p. vLLM runs its engine core in a process of its own; deltas are batched
there (`stream_interval`), because handling every token of every rollout alone would keep this
process busy and delay the very verdicts that stop a rollout.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from student_trainer.errors import SamplerDiedError, SamplerError, WeightSyncError, one_line, some
from student_trainer.records import Delta, SamplingOptions
from student_trainer.rollouts.samplers.base import Passage, Weights
from student_trainer.rollouts.samplers.vllm_adapter import AdapterInVllm, request
from student_trainer.rollouts.samplers.vllm_deltas import delta_of
from student_trainer.rollouts.samplers.vllm_reload import ReloadsWeights, cause
from student_trainer.rollouts.samplers.vllm_transfer import VllmTransfer, free_cached_memory
from student_trainer.rollouts.weight_buffer import WeightBuffer
from teacher_wire.id_ranges import IdRanges, num_ids, within
from vllm_process.children import children_end_with_us, kill_engines
from vllm_process.cores import AUTO, children_on, executor_on
from vllm_process.memory import children_keep_freed_memory
from vllm_process.output import EngineOutput

if TYPE_CHECKING:
    from vllm.config.model import ModelDType
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
MAX_SOCKET_FOLDER_BYTES = 70
"""Of the 107 of a socket's name 37 are the name that vLLM makes."""
MAX_BIASED_IDS_V2 = 1024
"""Of a request, in vLLM's second model runner; the first has no limit."""
KILL_AGAIN_S = 0.1
DEATH_POLL_S = 0.5
_NO_COMPILER = "TORCH_COMPILE_DISABLE"
_EXTENSION = f"{ReloadsWeights.__module__}.{ReloadsWeights.__qualname__}"


@dataclass(kw_only=True, eq=False)
class VllmSampler:
    """A Sampler over one vLLM engine.

    It ends at the end tokens of the model's generation_config and at `stop_ids`.
    """

    model: str
    dtype: str
    max_context: int
    max_num_topk: int
    max_num_seqs: int
    stream_interval: int
    kv_cache_gib: float
    gpu_memory_utilization: float
    enforce_eager: bool
    cpu_cores: str
    seed: int
    tensor_parallel_size: int = 1
    gpus: tuple[int, ...] = ()
    worker_extension: str = _EXTENSION
    stop_ids: tuple[int, ...] = ()
    passage: Passage = field(default_factory=WeightBuffer)
    """How weights come to it, or the matrices of its adapter: those as files."""
    adapter: AdapterInVllm | None = None
    """Of an adapter that takes what `load_weights` brings, beside weights that stay."""
    transfer: VllmTransfer | None = None
    """vLLM's own way for whole weights, in place of `passage`."""
    sleep_level: int = 0
    """vLLM's: 1 keeps the weights in the host's memory, 2 keeps nothing; 0 does not sleep."""
    _engine: AsyncLLM | None = field(default=None, init=False)
    _output: EngineOutput | None = field(default=None, init=False)
    _num_under_way: int = field(default=0, init=False)
    _building: asyncio.Future[None] | None = field(default=None, init=False)
    _is_given_up: bool = field(default=False, init=False)
    _adapted_by: LoRARequest | None = field(default=None, init=False)
    _is_asleep: bool = field(default=False, init=False)

    async def start(self) -> None:
        """Loads the model into vLLM; tens of seconds. Raises SamplerError.

        The loop is free meanwhile.
        """
        _check_socket_folder()
        self._output = EngineOutput("sampler")
        # The engine's process ends with the thread that starts it: this one lasts as the loop does.
        self._building = asyncio.ensure_future(asyncio.to_thread(self._build, self._output))
        try:
            await asyncio.shield(self._building)
        except ImportError as error:
            raise SamplerError(
                f"vLLM is not installed whole: {error}; `make setup`, or "
                'sampler.kind = "hf_batched"'
            ) from error
        # Whatever the model's code raises, and vLLM's own checks.
        except Exception as error:
            raise SamplerError(
                f"vLLM cannot generate with {self.model}: {self._output.cause(error)}"
            ) from error

    def _build(self, output: EngineOutput) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # An older setting of whole GiB, which would win over ours.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu, ranks = current_platform.is_cpu(), self.tensor_parallel_size
        cores = self.cpu_cores if on_cpu else AUTO
        args = AsyncEngineArgs(
            model=self.model,
            dtype=cast("ModelDType", self.dtype),
            max_model_len=self.max_context,
            max_logprobs=max(1, self.max_num_topk),
            # One for the proof of new weights, which must not wait until a rollout ends.
            max_num_seqs=self.max_num_seqs + 1,
            logprobs_mode="processed_logprobs",
            stream_interval=self.stream_interval,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory_bytes=int(self.kv_cache_gib * 2**30 / ranks) if on_cpu else None,
            enforce_eager=self.enforce_eager,
            enable_prefix_caching=True,
            # On a CPU a prompt with a seed that is computed in parts ends vLLM 0.32: it winds the
            # generator back, which torch's on a CPU refuses. None is vLLM's own choice.
            enable_chunked_prefill=False if on_cpu else None,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=self.seed,
            # As the learner's: rounded to bfloat16, many neighbours in a top-k are equal. On a CPU
            # vLLM would cast the whole head on every step.
            hf_overrides={} if on_cpu else {"head_dtype": "float32"},
            tensor_parallel_size=ranks,
            device_ids=[*self.gpus] or None,
            distributed_executor_backend=executor_on(cores, ranks),
            worker_extension_cls=self.worker_extension,
            # vLLM refuses it on a CPU, where its workers only pass over what they are asked.
            enable_sleep_mode=self.sleep_level > 0 and not on_cpu,
            **(self.adapter.engine_args() if self.adapter else {}),
            **(self.transfer.engine_args() if self.transfer else {}),
        )
        with (
            children_on(cores, ranks),
            children_end_with_us(),
            output.of_children(),
            children_keep_freed_memory() if on_cpu else nullcontext(),
            _children_compile_nothing() if self.enforce_eager and on_cpu else nullcontext(),
        ):
            if self._is_given_up:
                raise RuntimeError("the sampler was closed while it started")
            self._engine = AsyncLLM.from_engine_args(args)

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        if self._is_asleep:
            raise RuntimeError("the sampler is asked while it sleeps")
        params = SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            logprobs=options.num_topk,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=self._possible_stop_ids(),
            logit_bias=self._bias(options.excluded_ids),
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = TokensPrompt(prompt_token_ids=prompt_ids.tolist())
        self._num_under_way += 1
        try:
            with self._engine_lives():
                async for output in self._running().generate(
                    prompt, params, request_id, lora_request=self._adapted_by
                ):
                    yield delta_of(request_id, output.outputs[0], options.num_topk)
        finally:
            self._num_under_way -= 1

    def _possible_stop_ids(self) -> list[int]:
        """vLLM refuses an id that the model has no logit for, and that it can never say."""
        return [token_id for token_id in self.stop_ids if token_id < self._vocab_size()]

    def _bias(self, excluded: IdRanges) -> dict[int, float] | None:
        """Added before temperature and softmax, so that the processed log-probs leave them out too.

        Raises SamplerError for more than the engine takes.
        """
        present = within(excluded, 0, self._vocab_size())
        count, is_v2 = num_ids(present), self._running().vllm_config.use_v2_model_runner
        if is_v2 and count > MAX_BIASED_IDS_V2:
            raise SamplerError(
                f"{count} ids take no part, and vLLM's second model runner leaves out at most "
                f"{MAX_BIASED_IDS_V2}: set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        return {i: -math.inf for start, end in present for i in range(start, end)} or None

    def _vocab_size(self) -> int:
        return self._running().model_config.get_vocab_size()

    async def abort(self, request_ids: Sequence[str]) -> None:
        with self._engine_lives():
            await self._running().abort(list(request_ids))

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        self.passage.make_room(num_bytes, say)

    async def sleep(self) -> None:
        if self.sleep_level and not self._is_asleep:
            await self._change_memory(self._running().sleep(self.sleep_level), "give up")
            self._is_asleep = True

    async def _wake(self, part: str) -> None:
        """Of a sleeping engine the weights' memory, or that of the KV cache, with which it goes on.
        It is what the learner has used meanwhile, and keeps for itself unless it is told."""
        if self._is_asleep:
            free_cached_memory()
            await self._change_memory(self._running().wake_up(tags=[part]), "have again")

    async def _change_memory(self, asked: Awaitable[object], what: str) -> None:
        """Raises SamplerError where the engine cannot."""
        try:
            await self._answer_or_death(asked)
        except SamplerDiedError:
            raise
        # CUDA's, or vLLM's own.
        except Exception as error:
            raise SamplerError(
                f"vLLM cannot {what} its memory: {one_line(error)[:300]}; a smaller "
                "optim.micro_batch_tokens or sampler.gpu_memory_utilization, or "
                "sampler.sleep_level = 0"
            ) from error

    async def load_weights(self, weights: Weights) -> None:
        async with self._frozen() as engine:
            await self._wake("weights")
            if self.transfer is not None:
                kept = await self.transfer.send(engine, weights, self._answer_or_death)
            else:
                num_readers = engine.vllm_config.parallel_config.world_size
                kept = await self.passage.send(weights, self._receive, num_readers)
            await self._wake("kv_cache")
            self._is_asleep = False
            reset = await self._answer(engine.reset_prefix_cache(reset_running_requests=True))
        if names := sorted({name for names in kept for name in names}):
            raise WeightSyncError(
                f"vLLM keeps {len(names)} tensors of the weights before: the learner's have no "
                f"{some(names)} as this family's model in vLLM expects them; "
                'sampler.kind = "hf_batched"'
            )
        if not reset:
            raise RuntimeError("vLLM did not drop its prefix cache after new weights were loaded")

    async def _receive(self, where: str) -> list[list[str]]:
        """Has every worker read what is there; returns the names of what it kept as it was."""
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = self._running()
        method = "take_adapter" if self.adapter is not None else "reload_every_weight"
        try:
            answers = await self._answer(engine.collective_rpc(method, args=(where,)))
            if (why := cause(answers)) is not None:
                raise RuntimeError(why)
        except EngineDeadError:
            raise
        # vLLM's own, too.
        except Exception as error:
            what, remedy = (
                ("adapter", '; student.lora.sync = "merged"') if self.adapter else ("weights", "")
            )
            raise WeightSyncError(
                f"vLLM cannot load the learner's {what}: {one_line(error)[:300]}{remedy}"
            ) from error
        if self.adapter is not None:
            self._adapted_by = request(where, replaced=False)
        return [kept for kept, _ in answers]

    async def close(self) -> None:
        if self._building is not None:
            self._is_given_up = True
            while not self._building.done():
                # Nothing else ends an engine that starts, and its process may be there any moment.
                kill_engines()
                await asyncio.wait({self._building}, timeout=KILL_AGAIN_S)
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        if self._output is not None:
            self._output.close()
        self.passage.close()
        if self.transfer is not None:
            self.transfer.close()

    @asynccontextmanager
    async def _frozen(self) -> AsyncIterator[AsyncLLM]:
        """The engine, in which nothing goes on within; no request ends by that."""
        engine = self._running()
        with self._engine_lives():
            if not self._num_under_way:
                yield engine
                return
            await self._answer(engine.pause_generation(mode="keep", clear_cache=False))
            try:
                yield engine
            finally:
                # Of one that waits for weights that will not come there is no answer.
                if not engine.errored and not (self.transfer and self.transfer.is_broken):
                    await self._answer(engine.resume_generation())

    async def _answer(self, asked: Awaitable[T]) -> T:
        """Of vLLM's process; who asks it waits for good in vLLM 0.32 when it dies meanwhile."""
        from vllm.v1.engine.exceptions import EngineDeadError

        answer = asyncio.ensure_future(asked)
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=DEATH_POLL_S)
                if self._running().errored and not answer.done():
                    raise EngineDeadError
            return answer.result()
        finally:
            answer.cancel()

    async def _answer_or_death(self, asked: Awaitable[T]) -> T:
        with self._engine_lives():
            return await self._answer(asked)

    @contextmanager
    def _engine_lives(self) -> Iterator[None]:
        """Raises SamplerDiedError when vLLM's process is found dead within."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            why = self._output.cause(error) if self._output is not None else str(error)
            raise SamplerDiedError(f"vLLM's engine has died: {why}") from error

    def _running(self) -> AsyncLLM:
        if self._engine is None:
            raise RuntimeError("the sampler is not started")
        return self._engine


def _check_socket_folder() -> None:
    """vLLM's processes talk over sockets in the folder of temporary files. Where their names do not
    fit it fails late, and its sockets then keep this process from ending."""
    folder = os.environ.get("VLLM_RPC_BASE_PATH", tempfile.gettempdir())
    if len(os.fsencode(folder)) > MAX_SOCKET_FOLDER_BYTES:
        raise SamplerError(
            f"vLLM makes sockets in {folder}, whose name may have at most "
            f"{MAX_SOCKET_FOLDER_BYTES} bytes: set TMPDIR to a shorter one"
        )


@contextmanager
def _children_compile_nothing() -> Iterator[None]:
    """For processes started within. vLLM compiles two small functions of its sampling even where
    the model is not compiled: seconds of a C++ compiler, once more for each shape of the batch."""
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        os.environ.pop(_NO_COMPILER)
        if before is not None:
            os.environ[_NO_COMPILER] = before
