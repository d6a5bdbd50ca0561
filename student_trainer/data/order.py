"""Which prompts a step takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from student_trainer.errors import DatasetError
from student_trainer.records import Prompt


class PromptOrder:
    """Which prompts a step takes: a fresh permutation a pass, determined by the seed alone."""

    def __init__(self, prompts: Sequence[Prompt], *, prompts_per_step: int, seed: int) -> None:
        if prompts_per_step > len(prompts):
            raise DatasetError(
                f"rollout.prompts_per_step is {prompts_per_step}, the dataset has {len(prompts)}"
            )
        self._prompts = prompts
        self.prompts_per_step = prompts_per_step
        self._seed = seed

    def step(self, step: int) -> list[Prompt]:
        """The prompts of a step; a pass drops its last incomplete step."""
        steps_per_pass = len(self._prompts) // self.prompts_per_step
        passes, within = divmod(step, steps_per_pass)
        order = np.random.default_rng((self._seed, passes)).permutation(len(self._prompts))
        start = within * self.prompts_per_step
        return [self._prompts[i] for i in order[start : start + self.prompts_per_step]]
