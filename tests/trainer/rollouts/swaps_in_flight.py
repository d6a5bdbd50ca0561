"""For tests of weights that are replaced under rollouts that go on."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel


def changed_copy(model: PreTrainedModel, by: float) -> PreTrainedModel:
    """The same with noise of this size on every weight."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += by * torch.randn_like(parameter)
    return changed


def newest_version(
    logprobs: Sequence[NDArray[np.float32]], seen: NDArray[np.float32], tolerance: float
) -> int:
    """Which of some versions said the last token of a rollout, given each one's log-probs [T] of
    all tokens, in order, and those that were seen.

    Checks that every token is of one version, and never of an older one than the token before.
    """
    gaps = np.stack([np.abs(own - seen) for own in logprobs])
    assert gaps.min(0).max() < tolerance
    newest = 0
    for column in gaps.T:
        newest += int(np.argmax(column[newest:] < tolerance))
        assert column[newest] < tolerance
    return newest
