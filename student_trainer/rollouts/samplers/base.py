"""The seam between rollouts and the generating engine. Free of torch and vllm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from student_trainer.records import Delta, SamplingOptions


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

    async def load_weights(self, folder: Path) -> None:
        """Replaces the weights by the safetensors in a folder and drops every cached prefix.

        Must not be called while anything is being generated.
        """

    async def close(self) -> None:
        """Frees the engine."""
