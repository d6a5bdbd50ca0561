"""The reference sampler: transformers, a token at a time, a rollout at a time. Obvious and slow.

It samples from exactly the distribution whose log-probs it reports (sampling.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from student_trainer.pretrained import load_student
from student_trainer.records import Delta, Finish, SamplingOptions
from student_trainer.rollouts.samplers.base import Weights
from student_trainer.rollouts.samplers.loaded_model import end_ids, load_sent_weights
from student_trainer.rollouts.samplers.sampling import Uniforms, drawn


class HfSampler:
    """A Sampler over one transformers model.

    It ends at the end tokens of the model's generation_config and at `stop_ids`.
    """

    def __init__(
        self, *, model: str, dtype: str, device: torch.device, stop_ids: Sequence[int] = ()
    ) -> None:
        self._path = model
        self._dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        self._device = device
        self._stop_ids = stop_ids
        self._loaded: PreTrainedModel | None = None
        self._running: set[str] = set()
        self._aborted: set[str] = set()
        self._version = 0
        """Of the weights: what an older one has cached is computed anew."""

    async def start(self) -> None:
        self._loaded = load_student(self._path, dtype=self._dtype, device=self._device).eval()

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        model = self._model()
        stop_ids = {*end_ids(model), *self._stop_ids}
        uniforms = Uniforms(options.seed)
        sequence = prompt_ids.tolist()
        cache, version = DynamicCache(config=model.config), self._version
        step_ids = self._row(sequence)
        self._running.add(request_id)
        try:
            for position in range(options.max_tokens):
                with torch.no_grad():
                    logits = model(step_ids, past_key_values=cache).logits[0, -1].float().cpu()
                row = drawn(logits, options, uniforms.take(1)[0])
                token = int(row.token_ids)
                finish = None
                if token in stop_ids:
                    finish = Finish.STOP
                elif request_id in self._aborted:
                    finish = Finish.TRUNCATED
                elif position == options.max_tokens - 1:
                    finish = Finish.LENGTH
                yield Delta(
                    token_ids=np.array([token], np.int32),
                    logprobs=np.array([row.logprobs], np.float32),
                    topk_ids=row.topk_ids.int().numpy()[None],
                    topk_logprobs=row.topk_logprobs.numpy()[None],
                    finish=finish,
                )
                if finish is not None:
                    return
                sequence.append(token)
                step_ids = self._row(sequence[-1:])
                await asyncio.sleep(0)
                if version != self._version:
                    cache, version = DynamicCache(config=model.config), self._version
                    step_ids = self._row(sequence)
        finally:
            self._running.discard(request_id)
            self._aborted.discard(request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._aborted.update(self._running.intersection(request_ids))

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        """They pass through nothing."""

    async def sleep(self) -> None:
        """It does not."""

    async def load_weights(self, weights: Weights) -> None:
        load_sent_weights(self._model(), weights)
        self._version += 1

    async def close(self) -> None:
        self._loaded = None

    def _row(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self._device)

    def _model(self) -> PreTrainedModel:
        if self._loaded is None:
            raise RuntimeError("the sampler is not started")
        return self._loaded
