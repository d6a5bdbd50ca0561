"""The language-model head on a CPU: logits in float32, whatever the weights are. Torch, no vLLM.

Legend: R = rows, H = hidden size, V = vocabulary, B = vocabulary entries at once.
"""

from __future__ import annotations

import torch

WEIGHTS_AT_ONCE = 2**21
"""B x H: 8 MB of float32, which the product of the next block finds in cache."""


def logits_in_blocks(
    hidden_RH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None = None
) -> torch.Tensor:
    """[R, V] float32, what `linear(hidden.float(), weight.float(), bias.float())` gives.

    Most CPUs have no arithmetic for bfloat16 and multiply it seven times slower than float32, so
    weights are widened a block at a time, which is exact and takes a few MB. The blocks are the
    product's left side: with few rows a CPU multiplies that faster than the usual order.
    """
    num_rows, hidden_size = hidden_RH.shape
    vocab_size = len(weight_VH)
    hidden_HR = hidden_RH.float().t().contiguous()
    block = max(1, WEIGHTS_AT_ONCE // hidden_size)
    wide_BH = torch.empty(min(block, vocab_size), hidden_size)
    logits_RV = torch.empty(num_rows, vocab_size)
    for start in range(0, vocab_size, block):
        part_BH = weight_VH[start : start + block]
        if part_BH.dtype != torch.float32:
            part_BH = wide_BH[: len(part_BH)].copy_(part_BH)
        logits_RV[:, start : start + len(part_BH)] = torch.mm(part_BH, hidden_HR).t()
    return logits_RV if bias_V is None else logits_RV.add_(bias_V.float())
