"""The seam between rollouts and the generating engine. Free of torch and vllm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from student_trainer.records import Delta, SamplingOptions

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Weights: TypeAlias = "Iterator[tuple[str, Tensor]]"
"""Names and tensors, each once, to be read once: as the sampler reads them from a checkpoint, and
in its arithmetic."""


class Sampler(Protocol):
    """Generates from the student's current weights."""

    async def start(self) -> None:
        """Loads the model."""

    def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        """Yields new tokens as they come; the last delta carries `finish`."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Ends these generations soon; their iterators stop. Unknown ids are ignored."""

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        """For weights of so many bytes on their way here; what was not expected of it is said.

        Raises ConfigError when there is none.
        """

    async def sleep(self) -> None:
        """Gives up what memory it can until new weights are loaded; until then nobody asks it for
        anything. What is being generated ends. Nothing for one that does not sleep."""

    async def load_weights(self, weights: Weights) -> None:
        """Replaces the weights and drops every cached prefix.

        What is being generated goes on with them: its tokens so far are a prompt to it, computed
        anew. None is lost or said twice. Raises WeightSyncError, SamplerError.
        """

    async def close(self) -> None:
        """Frees the engine."""


class Passage(Protocol):
    """How weights come from this process into those of a sampler."""

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        """As of a sampler."""

    async def send(
        self, weights: Weights, receive: Callable[[str], Awaitable[T]], num_readers: int = 1
    ) -> T:
        """Calls `receive` with where they are to be had, by so many processes, and returns what it
        returns."""

    def close(self) -> None:
        """Leaves nothing behind."""
