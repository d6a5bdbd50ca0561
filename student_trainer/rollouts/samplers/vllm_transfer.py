"""The learner's weights into vLLM by its own weight transfer: CUDA IPC on one GPU, NCCL beyond it.

vLLM's helpers pack and send on this side, and receive and load in its workers. They block: so they
have a thread of their own, from which their calls of the engine go back to the sampler's loop. Of
several processes each sends to its own engine, all of them the same tensors at the same time.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from student_trainer.errors import SamplerDiedError, WeightSyncError, one_line
from student_trainer.records import Announced, WrittenTensor
from student_trainer.rollouts.samplers.vllm_reload import Answer, cause

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import (
        ParamMeta,
        TrainerInitInfo,
        TrainerWeightTransferEngine,
    )
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
Answered = Callable[[Awaitable[Any]], Awaitable[Any]]
BUFFER_BYTES = 256 << 20
"""Of a GPU's memory, on each side; as large as the largest tensor where that is larger. IPC takes
one of them, NCCL two. vLLM's own is 1 GiB, which a head of 152k x 4,096 in bfloat16 does not fit
into: IPC refuses it."""
GRACE_S = 10.0
"""For vLLM's helper to end by itself when its engine has failed. One that waits in NCCL for a
worker that does not come never does."""

POLL_S = 0.5
NOT_WANTED = "the weights are not wanted any more"


@dataclass(kw_only=True, eq=False)
class VllmTransfer:
    """The way of one learner's weights to one engine."""

    backend: str
    """vLLM's name: "ipc" or "nccl"."""
    device: torch.device
    """Of the learner."""
    is_broken: bool = field(default=False, init=False)
    """One has broken off: the engine may have a part of the weights, or wait for the rest."""
    _sender: TrainerWeightTransferEngine[Any] | None = field(default=None, init=False)

    def engine_args(self) -> Mapping[str, Any]:
        """Of an engine that takes them."""
        from vllm.config.weight_transfer import WeightTransferConfig

        return {"weight_transfer_config": WeightTransferConfig(backend=self.backend)}

    def init_info(self, tensors: Sequence[WrittenTensor], num_workers: int) -> TrainerInitInfo:
        """What vLLM's two ends agree on. To its engine each process is the sender: rank 0."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        room = max(BUFFER_BYTES, *(tensor.num_bytes for tensor in tensors))
        if self.backend == "ipc":
            return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=room)
        return NCCLTrainerInitInfo(
            rank=0,
            master_address="127.0.0.1",
            master_port=get_open_port(),
            world_size=1 + num_workers,
            packed=True,
            packed_buffer_size_bytes=room,
        )

    async def send(
        self, engine: AsyncLLM, weights: Iterator[tuple[str, Tensor]], answered: Answered
    ) -> list[list[str]]:
        """Replaces the weights of an engine that does nothing else; returns the names of what each
        worker kept. `answered` waits for the engine, or raises SamplerDiedError.

        Raises WeightSyncError, and what `weights` raises; the engine is of no use then.
        """
        if not isinstance(weights, Announced):
            raise TypeError("vLLM's weight transfer has to know which weights will come")
        if self.is_broken:
            raise WeightSyncError("a transfer of weights has broken off before: start the run anew")
        self.is_broken = True
        _checked(await answered(engine.collective_rpc("expect_weights")))
        await self._sent(engine, weights, answered)
        kept = _checked(await answered(engine.collective_rpc("kept_weights")))
        self.is_broken = False
        return kept

    async def _sent(self, engine: AsyncLLM, weights: Announced, answered: Answered) -> None:
        client = _Client(engine, asyncio.get_running_loop(), answered)
        source = _Source(weights, client)
        workers = engine.vllm_config.parallel_config.world_size
        try:
            await _beside(lambda: self._send(client, source, workers), client)
        except (SamplerDiedError, WeightSyncError):
            raise
        # vLLM's own, too.
        except Exception as error:
            if error is source.error:
                raise
            raise WeightSyncError(
                f"vLLM cannot load the learner's weights by its weight transfer, "
                f'sampler.weight_transfer = "{self.backend}": {one_line(error)[:300]}; "host" '
                "needs neither CUDA IPC nor NCCL"
            ) from error

    def _send(self, client: _Client, source: _Source, num_workers: int) -> None:
        """In a thread of its own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # vLLM packs on streams of its own, which wait for no update that is under way.
            torch.cuda.synchronize(self.device)
        if self._sender is None:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

            self._sender = WeightTransferTrainerFactory.trainer_init(
                self.init_info(source.weights.tensors, num_workers),
                client=client,
                source=source.as_vllm(),
            )
        group = getattr(self._sender, "model_update_group", None)
        if group is not None and group.disabled:
            # vLLM would broadcast nothing, and load what its memory held before.
            raise WeightSyncError(
                'sampler.weight_transfer is "nccl", and vLLM has no NCCL here: "host", or make it '
                "find the library (VLLM_NCCL_SO_PATH; VLLM_DISABLE_PYNCCL must not be set)"
            )
        self._sender.client, self._sender.source = client, source.as_vllm()
        self._sender.send_weights()

    def close(self) -> None:
        """Ends what is under way, and frees what this side holds for it."""
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None


class _Client:
    """vLLM's `VLLMWeightSyncClient`: what its helper asks the engine, from another thread than the
    one of the engine's loop."""

    def __init__(
        self, engine: AsyncLLM, loop: asyncio.AbstractEventLoop, answered: Answered
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._answered = answered
        self._asking: set[asyncio.Task[Any]] = set()
        self.is_stopped = False
        self.failed: asyncio.Future[None] = loop.create_future()
        """Raises what the engine answered first that was an error."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info=init_info)
        self._wait(lambda: self._engine.init_weight_transfer_engine(request))

    def start_weight_update(self) -> None:
        self._wait(lambda: self._engine.start_weight_update())

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        if "ipc_handles" in update_info:
            # They hold classes of torch, which vLLM's messages do not: it would pickle them if
            # VLLM_ALLOW_INSECURE_SERIALIZATION were set, and then on both sides, for everything.
            self._wait(lambda: self._by_handles(pickle.dumps(update_info)))
            return
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        request = WeightTransferUpdateRequest(update_info=update_info)
        self._wait(lambda: self._engine.update_weights(request))

    async def _by_handles(self, pickled: bytes) -> None:
        _checked(await self._engine.collective_rpc("update_by_handles", args=(pickled,)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait(lambda: self._engine.finish_weight_update(weight_version))

    def stop(self) -> None:
        """Whoever waits for an answer, or asks from here on, waits no more. In the loop."""
        self.is_stopped = True
        for asking in self._asking:
            asking.cancel()

    def _wait(self, ask: Callable[[], Awaitable[None]]) -> None:
        """Ends too where the loop has: a thread of vLLM's that waits here is waited for at the end
        of the process."""
        if not (self.is_stopped or self._loop.is_closed()):
            answer = asyncio.run_coroutine_threadsafe(self._ask(ask), self._loop)
            while not self.is_stopped:
                if wait([answer], timeout=POLL_S).done:
                    return answer.result()
            answer.cancel()
        raise WeightSyncError(NOT_WANTED)

    async def _ask(self, ask: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            await self._answered(ask())
        except Exception as error:
            if not self.failed.done():
                self.failed.set_exception(error)
            raise
        finally:
            self._asking.discard(task)


class _Source:
    """What is sent, as vLLM's `WeightSource`: all of it once."""

    def __init__(self, weights: Announced, client: _Client) -> None:
        self.weights = weights
        self.error: Exception | None = None
        """What the learner raised when it was asked for them."""
        self._client = client

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        try:
            for item in self.weights:
                if self._client.is_stopped:
                    raise WeightSyncError(NOT_WANTED)
                yield item
        except Exception as error:
            self.error = error
            raise

    def as_vllm(self) -> Any:
        """An instance of the class that vLLM asks for."""
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

        source = self

        class Source(WeightSource):
            def metadata(self) -> list[ParamMeta]:
                return [
                    ParamMeta(tensor.name, getattr(torch, tensor.dtype), tensor.shape)
                    for tensor in source.weights.tensors
                ]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return source.tensors()

        return Source()


def free_cached_memory() -> None:
    """What this process's learner has used of a GPU, and PyTorch keeps for it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


async def _beside(work: Callable[[], None], client: _Client) -> None:
    """Does it in a thread of its own, which nobody waits for at the end of the process: it may wait
    in NCCL for good. Raises the engine's error, or else that of `work`."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def act() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:  # noqa: BLE001 - raised again in the loop
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=act, name="weight-transfer", daemon=True).start()
    try:
        await asyncio.wait({ended, client.failed}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        client.stop()
        await asyncio.wait({ended}, timeout=GRACE_S)
        errors = [f.exception() for f in (client.failed, ended) if f.done()]
    for error in errors:
        if error is not None:
            raise error


def _checked(answers: Sequence[Answer]) -> list[list[str]]:
    """What each worker kept. Raises WeightSyncError."""
    if (why := cause(answers)) is not None:
        raise WeightSyncError(f"vLLM cannot take the learner's weights: {why[:300]}")
    return [kept for kept, _ in answers]
