"""Puts the learner's weights into the sampler, and proves that they arrived.

The weights travel as safetensors in a RAM-backed folder, in the sampler's own arithmetic, and vLLM
reloads them in place: about 40 ms for a small model. Knows no model: the learner says what its
log-probs are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from student_trainer.errors import WeightSyncError
from student_trainer.process.writing import writing_to
from student_trainer.records import AS_LEARNT, Delta, SamplingOptions, WeightFormat
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.weight_folder import weight_folder
from teacher_wire.id_ranges import IdRanges

PROBE_TOKENS = 8


class WeightOwner(Protocol):
    """Whose weights travel."""

    def export_weights(self, to: Path, written: WeightFormat) -> None:
        """Writes them as safetensors into a folder."""

    def export_bytes(self, written: WeightFormat) -> int:
        """How many bytes of tensors that will be."""

    def logprobs(
        self, prompt_ids: NDArray[np.int32], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """[T] of a prompt's continuation at temperature 1."""


class WeightSync:
    """Moves one learner's weights into one sampler, step after step."""

    def __init__(
        self,
        learner: WeightOwner,
        sampler: Sampler,
        *,
        probe_prompts: Sequence[NDArray[np.int32]],
        max_logprob_gap: float,
        written: WeightFormat = AS_LEARNT,
        folder: Path | None = None,
        say: Callable[[str], None] = print,
        excluded_ids: IdRanges = (),
    ) -> None:
        """The gap is in nats; it is measured on a few tokens sampled after each probe prompt.

        `excluded_ids` take no part in the learner's distributions. `folder` is where the weights
        pass through; None chooses. Raises ConfigError and WeightSyncError when they have no room
        there.
        """
        self._learner = learner
        self._sampler = sampler
        self._probe_prompts = probe_prompts
        self._max_logprob_gap = max_logprob_gap
        self._written = written
        self._excluded_ids = excluded_ids
        self._folder = weight_folder(learner.export_bytes(written), folder, say)

    async def push(self, version: int) -> float:
        """Loads the learner's weights into the sampler and returns the largest log-prob gap.

        Raises WeightSyncError when it passes `max_logprob_gap`.
        """
        path = self._folder.path
        with writing_to(
            path, WeightSyncError, remedy="make room there, or set sampler.weights_dir"
        ):
            self._learner.export_weights(path, self._written)
        await self._sampler.load_weights(path)
        gaps = []
        for index, prompt_ids in enumerate(self._probe_prompts):
            tokens, logprobs = await self._sampled(f"probe-{version}-{index}", prompt_ids)
            gaps.append(np.abs(self._learner.logprobs(prompt_ids, tokens) - logprobs).max())
        # numpy's maximum, unlike max(), lets no NaN get lost.
        gap = float(np.max(gaps))
        if not gap <= self._max_logprob_gap:
            raise WeightSyncError(
                f"after the sync of step {version} the sampler's log-probs differ from the "
                f"learner's by {gap:.3g} nats, more than {self._max_logprob_gap:.3g}"
            )
        return gap

    def close(self) -> None:
        """Removes the folder of weights."""
        self._folder.close()

    async def _sampled(
        self, request_id: str, prompt_ids: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        options = SamplingOptions(
            max_tokens=PROBE_TOKENS, temperature=1.0, seed=0, excluded_ids=self._excluded_ids
        )
        deltas: list[Delta] = [
            delta async for delta in self._sampler.generate(request_id, prompt_ids, options)
        ]
        return (
            np.concatenate([delta.token_ids for delta in deltas]),
            np.concatenate([delta.logprobs for delta in deltas]),
        )
