"""Every weight of a model a little different for a while: what a sampler passes over shows then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from student_trainer.learner.sharding import own_part

CHANGED_BIT = 1 << 19
"""Of a float32's 23 bits of mantissa the fourth from the top."""
ZERO_CHANGED = 0x3C800001
"""The float32 that a 0 becomes: 2 ** -6 and the least bit, which no weight of bfloat16 has."""
MAGNITUDE = 0x7FFFFFFF
"""Of a float32 all bits but the sign's."""
FLIPPED_AT_ONCE = 1 << 24
"""Weights, so that there is no second copy of a large tensor."""


@contextmanager
def flipped(model: nn.Module) -> Iterator[None]:
    """Within it every float32 weight is a little different, behind it the very same bits.

    A bit of each mantissa is flipped: 3 to 6 % up or down, which bfloat16 can still tell, and no
    second copy of the model. A 0, of which that would make next to nothing, changes places with
    ZERO_CHANGED, and what 0 with the bit is with ZERO_CHANGED with the bit.
    """
    _flip(model)
    try:
        yield
    finally:
        _flip(model)


def _flip(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            bits = torch.atleast_1d(own_part(parameter).view(torch.int32))
            rows = max(1, FLIPPED_AT_ONCE * len(bits) // max(1, bits.numel()))
            for part in bits.split(rows):
                kind = part & (MAGNITUDE & ~CHANGED_BIT)
                is_zero = (kind == 0) | (kind == ZERO_CHANGED)
                part.bitwise_xor_(CHANGED_BIT)
                # With the bit these two change places too: else two numbers became one.
                part.bitwise_xor_(is_zero.to(torch.int32) * (ZERO_CHANGED ^ CHANGED_BIT))
