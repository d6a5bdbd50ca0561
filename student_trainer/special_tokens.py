"""Special tokens: masked before anything else looks at a response."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class SpecialTokens:
    """Which response positions count.

    Source: Revisiting On-Policy Distillation, released code (`opd_mask_first_tokens`): a student
    and a teacher of one family can disagree by tens of nats on `<` or `<|im_end|>` for no good
    reason.
    """

    def __init__(self, token_ids: Sequence[int], *, first_only: bool) -> None:
        self._ids = np.asarray(sorted(set(token_ids)), np.int32)
        self._first_only = first_only

    def mask(self, response_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[T] False where a token must not count. The mask of a prefix is a prefix of the mask."""
        special = np.isin(response_ids, self._ids)
        if self._first_only and special.any():
            positions = np.flatnonzero(special)
            _, first = np.unique(response_ids[positions], return_index=True)
            special[:] = False
            special[positions[first]] = True
        return ~special
