"""What a copy of the weights in fewer bits does not show of an update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from student_trainer.learner.sharding import own_part

SAMPLED = 4096
"""Weights looked at of each parameter, evenly spread: a share of them all is known to 1 %."""


def sample_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """[n] float32, a copy of weights evenly spread over the parameters, as far as this process has
    them; always the same ones."""
    return torch.cat([_spread(own_part(parameter.detach())).float() for parameter in parameters])


def lost_in_rounding(before: Tensor, after: Tensor, dtype: torch.dtype) -> float | None:
    """Share of the weights that changed whose copies in `dtype` are as before; None if none did.

    The weights themselves keep the change: it shows in the copy once enough has come together.
    """
    moved = before != after
    if not moved.any():
        return None
    return float((before.to(dtype) == after.to(dtype))[moved].float().mean())


def _spread(weights: Tensor) -> Tensor:
    flat = weights.flatten()
    return flat[:: max(1, len(flat) // SAMPLED)]
