"""Ends responses at text, over any sampler.

The samplers know ids. Here the text of a response is watched as it grows: the token with which a
stop string is complete is the last one, and what was generated past it is dropped before anybody
sees it. So both samplers end at the same token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from student_trainer.records import Delta, Finish, SamplingOptions
from student_trainer.rollouts.samplers.base import Sampler, Weights

MARGIN_TOKENS = 8
"""Before the window of a stop string: a first token may decode otherwise than within a text."""


class StopStringSampler:
    """A Sampler that ends another one's responses at text."""

    def __init__(
        self, sampler: Sampler, stop_strings: Sequence[str], decode: Callable[[list[int]], str]
    ) -> None:
        """`decode` gives the text of ids, special tokens included."""
        self._sampler = sampler
        self._stop_strings = stop_strings
        self._decode = decode
        # A token is at least a byte.
        longest = max(len(text.encode("utf-8")) for text in stop_strings)
        self._window = longest + MARGIN_TOKENS

    async def start(self) -> None:
        await self._sampler.start()

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        recent: list[int] = []
        ended = False
        async for delta in self._sampler.generate(request_id, prompt_ids, options):
            if ended:
                continue  # what comes between the abort and its effect
            ids = delta.token_ids.tolist()
            if (kept := self._tokens_to_stop(recent, ids)) is None:
                recent = [*recent, *ids][-self._window :]
                yield delta
                continue
            ended = True
            if delta.finish is None:
                await self._sampler.abort([request_id])
            yield replace(
                delta,
                token_ids=delta.token_ids[:kept],
                logprobs=delta.logprobs[:kept],
                topk_ids=delta.topk_ids[:kept],
                topk_logprobs=delta.topk_logprobs[:kept],
                finish=Finish.STOP,
            )

    def _tokens_to_stop(self, recent: list[int], ids: list[int]) -> int | None:
        """How many of the new ids complete a stop string; None when they do not."""
        if not self._has_one([*recent, *ids]):
            return None
        counts = range(1, len(ids) + 1)
        return next((n for n in counts if self._has_one([*recent, *ids[:n]])), None)

    def _has_one(self, ids: list[int]) -> bool:
        text = self._decode(ids)
        return any(stop in text for stop in self._stop_strings)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._sampler.abort(request_ids)

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        self._sampler.make_room(num_bytes, say)

    async def sleep(self) -> None:
        await self._sampler.sleep()

    async def load_weights(self, weights: Weights) -> None:
        await self._sampler.load_weights(weights)

    async def close(self) -> None:
        await self._sampler.close()
