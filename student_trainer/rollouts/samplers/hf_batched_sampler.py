"""Student rollouts with transformers, many at once, in this process: starts in a second.

The model runs in a thread of its own, so that the loop, which streams to the teacher meanwhile, is
never kept waiting. Between two steps that thread does what it was asked for: takes requests in,
ends some, loads weights. Tokens, log-probs and draws are the reference's (`HfSampler`) but for
rounding: the same distribution, and by the same seed the same tokens.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from student_trainer.errors import SamplerDiedError, SamplerError, one_line
from student_trainer.pretrained import load_student
from student_trainer.records import Delta, SamplingOptions
from student_trainer.rollouts.samplers.base import Weights
from student_trainer.rollouts.samplers.batch_check import check_batch, check_state
from student_trainer.rollouts.samplers.loaded_model import end_ids, load_sent_weights
from student_trainer.rollouts.samplers.running_batch import Events, Request, RunningBatch

SMALL_PARAMETERS = 10_000_000
"""Below so many a second thread of a forward pass costs more than it gives."""

_Inbox = asyncio.Queue[Delta | SamplerError]


@dataclass(kw_only=True, eq=False)
class HfBatchedSampler:
    """A Sampler over one transformers model, with continuous batching.

    It ends at the end tokens of the model's generation_config and at `stop_ids`. The learner's own
    model in place of a path is generated with as it is: nothing is loaded, nothing is sent, and
    nothing may learn while anything is generated.
    """

    model: str | PreTrainedModel
    dtype: str
    device: torch.device
    max_num_seqs: int
    stream_interval: int
    kv_cache_gib: float
    cpu_threads: int | None
    """None: one for a small model, else as many as this process."""
    stop_ids: Sequence[int] = ()
    _batch: RunningBatch | None = field(default=None, init=False)
    _loaded: PreTrainedModel | None = field(default=None, init=False)
    _asked: SimpleQueue[Callable[[], None] | None] = field(default_factory=SimpleQueue, init=False)
    _requests: dict[str, Request] = field(default_factory=dict, init=False)
    _inboxes: dict[Request, _Inbox] = field(default_factory=dict, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _loop: asyncio.AbstractEventLoop | None = field(default=None, init=False)
    _was_training: bool | None = field(default=None, init=False)

    async def start(self) -> None:
        """Loads the model. Raises CheckpointError, and SamplerError for a family that a batch would
        get wrong."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        threads = torch.get_num_threads()
        self._thread.start()
        try:
            await self._done(self._load)
        finally:
            # PyTorch gives threads that begin later what the last one chose for itself.
            torch.set_num_threads(threads)

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        """Raises SamplerError for a request that does not fit into the cache alone, and when a step
        of the batch fails."""
        batch = self._running()
        request = Request(prompt_ids=prompt_ids, options=options)
        if request.longest > batch.longest_request:
            raise SamplerError(
                f"the generation {request_id} may come to {request.longest} tokens, and "
                f"sampler.kv_cache_gib = {self.kv_cache_gib:g} holds {batch.longest_request} of "
                "one rollout: raise it, or lower rollout.max_context"
            )
        inbox: _Inbox = asyncio.Queue()
        self._requests[request_id], self._inboxes[request] = request, inbox
        self._asked.put(lambda: batch.add(request))
        is_over = False
        try:
            while True:
                delta = await inbox.get()
                if isinstance(delta, SamplerError):
                    raise delta
                is_over = delta.finish is not None
                yield delta
                if is_over:
                    return
        finally:
            del self._inboxes[request]
            if self._requests.get(request_id) is request:
                del self._requests[request_id]
            if not is_over:
                self._asked.put(lambda: self._end([request]))

    async def abort(self, request_ids: Sequence[str]) -> None:
        requests = [self._requests[name] for name in request_ids if name in self._requests]
        if requests:
            self._asked.put(lambda: self._end(requests))

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        """They pass through nothing."""

    async def sleep(self) -> None:
        """It does not."""

    async def load_weights(self, weights: Weights) -> None:
        """Of rollouts that have ended nothing is to be dropped: keys and values go with them."""
        await self._done(lambda: self._replace_weights(weights))

    async def close(self) -> None:
        if self._thread is None:
            return
        self._asked.put(None)
        await asyncio.to_thread(self._thread.join)
        self._thread = self._batch = self._loaded = None
        self._fail(SamplerError("the sampler was closed"))

    def _running(self) -> RunningBatch:
        if self._batch is None:
            raise RuntimeError("the sampler is not started")
        return self._batch

    async def _done(self, work: Callable[[], None]) -> None:
        """Once the sampler's thread has done it; raises what it raised."""
        future: Future[None] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                work()
            # Whatever it is, it is for whoever waits.
            except BaseException as error:  # noqa: BLE001
                future.set_exception(error)
            else:
                future.set_result(None)

        if self._thread is None:
            raise RuntimeError("the sampler is not started")
        self._asked.put(do)
        await asyncio.wrap_future(future)

    def _hand_out(self, events: Events) -> None:
        for request, delta in events:
            if (inbox := self._inboxes.get(request)) is not None:
                inbox.put_nowait(delta)

    def _fail(self, error: SamplerError) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)

    # What follows runs in the sampler's thread.

    def _work(self) -> None:
        while True:
            is_idle = self._batch is None or self._batch.is_idle
            try:
                work = self._asked.get(block=is_idle)
            except Empty:
                self._step()
                continue
            if work is None:
                return
            work()

    def _load(self) -> None:
        if isinstance(self.model, str):
            dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
            loaded = load_student(self.model, dtype=dtype, device=self.device).eval()
        else:
            loaded = self.model
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        elif loaded.num_parameters() < SMALL_PARAMETERS:
            torch.set_num_threads(1)
        check_state(loaded)
        was_training = loaded.training
        loaded.eval()
        try:
            if loaded.dtype == torch.float32:
                check_batch(loaded)
            self._batch = RunningBatch(
                loaded,
                max_num_seqs=self.max_num_seqs,
                stream_interval=self.stream_interval,
                max_cache_bytes=self.kv_cache_gib * 2**30,
                end_ids={*end_ids(loaded), *self.stop_ids},
            )
        finally:
            loaded.train(was_training)
        self._loaded = loaded

    def _step(self) -> None:
        """Hands out before anybody can think that nothing is generated only once that is so: the
        model is then in the mode that it was in."""
        batch, model = self._running(), self._loaded
        assert model is not None
        if self._was_training is None:
            self._was_training = model.training
            model.eval()
        try:
            events = batch.step()
        # Whatever PyTorch makes of it: no memory, say.
        except Exception as error:  # noqa: BLE001
            batch.clear()
            failure = _failed(error)
            self._call(lambda: self._fail(failure))
            events = []
        self._sort_out(events)

    def _end(self, requests: Sequence[Request]) -> None:
        self._sort_out(self._running().abort(requests))

    def _sort_out(self, events: Events) -> None:
        if self._running().is_idle and self._was_training is not None:
            assert self._loaded is not None
            self._loaded.train(self._was_training)
            self._was_training = None
        if events:
            self._call(lambda: self._hand_out(events))

    def _call(self, work: Callable[[], None]) -> None:
        """On the loop, if that still runs."""
        assert self._loop is not None
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    def _replace_weights(self, weights: Weights) -> None:
        if not isinstance(self.model, str):
            raise RuntimeError("the sampler generates with the learner's own weights")
        assert self._loaded is not None
        load_sent_weights(self._loaded, weights)
        self._running().compute_anew()


def _failed(error: Exception) -> SamplerError:
    """Another sampler may do it: the memory may be there then."""
    if isinstance(error, SamplerError):
        return SamplerError(str(error))
    why = f"{type(error).__name__}: {one_line(error)[:300]}"
    return SamplerDiedError(f"a step of the batch failed: {why}")
