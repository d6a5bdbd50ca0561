"""What a copy of the weights in fewer bits does not show of an update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def lost_in_rounding(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], dtype: torch.dtype
) -> float | None:
    """Share of the weights that changed whose copies in `dtype` are as before; None if none did.

    The weights themselves keep the change: it shows in the copy once enough has come together.
    """
    changed = lost = 0
    for name, new in after.items():
        old = before[name]
        moved = new != old
        changed += int(moved.sum())
        lost += int((moved & (new.to(dtype) == old.to(dtype))).sum())
    return lost / changed if changed else None
