"""A sampler whose engine may die and be replaced by another one of the same settings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from student_trainer.records import Delta, SamplingOptions
from student_trainer.rollouts.samplers.base import Sampler, Weights


class ReplaceableSampler:
    """A Sampler that is the `present` one, until `renew`; who holds it need not know."""

    def __init__(self, first: Sampler, another: Callable[[], Sampler]) -> None:
        self.present = first
        self._another = another
        self._room: tuple[int, Callable[[str], None]] | None = None

    def renew(self) -> None:
        """The next one, not started, in the place of one that was closed."""
        self.present = self._another()
        if self._room is not None:
            self.present.make_room(*self._room)

    async def start(self) -> None:
        await self.present.start()

    def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        return self.present.generate(request_id, prompt_ids, options)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self.present.abort(request_ids)

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        self._room = num_bytes, say
        self.present.make_room(num_bytes, say)

    async def sleep(self) -> None:
        await self.present.sleep()

    async def load_weights(self, weights: Weights) -> None:
        await self.present.load_weights(weights)

    async def close(self) -> None:
        await self.present.close()
