"""What multiplied the loss of each token, kept for whoever records the rollouts of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from student_trainer.records import Rollout


class TokenWeights:
    """Of some rollouts of a step, as this process learns from them for the first time."""

    def __init__(self, wanted: Mapping[int, Rollout]) -> None:
        """By whatever number; the others are passed over."""
        # A rollout whose behavior log-probs are computed anew is another object with these ids.
        self._numbers = {id(rollout.response_ids): n for n, rollout in wanted.items()}
        self._noted: dict[int, Tensor] = {}

    def note(self, rollouts: Sequence[Rollout], weight_BT: Tensor) -> None:
        """The weights of a micro-batch, [B, T] and detached. One that is done again, since it did
        not fit into memory, has the same."""
        for row, rollout in enumerate(rollouts):
            number = self._numbers.get(id(rollout.response_ids))
            if number is not None and not _stands_in(rollout):
                self._noted[number] = rollout.loss_weight * weight_BT[row, : len(rollout)]

    def by_number(self) -> dict[int, NDArray[np.float32]]:
        """[T] each, of those that this process has learnt from; 0 where masked."""
        return {number: kept.float().cpu().numpy() for number, kept in self._noted.items()}


def _stands_in(rollout: Rollout) -> bool:
    """Whether no token counts: so it is of the one that a process gets that has none of its own,
    and another process learns from it."""
    return not rollout.mask.any()
