"""For tests of weights that are replaced, under rollouts that go on too."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.trainer.learner.tiny_student import SHAPE


def tied_mixture() -> PreTrainedModel:
    """What a sync has most ways to get wrong: one layer of experts, which transformers holds fused
    and vLLM packs for its kernel, padded; one without; and a tied head."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SHAPE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0],
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config).train()


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
