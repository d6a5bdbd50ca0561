"""A language-model head whose logits are float32, whatever its weights are. Torch, no vLLM.

Rounded to bfloat16, the 16th and the 17th of 152k logits are equal in nearly half of all rows, and
a top-16 is half a matter of chance.
"""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel

from teacher_server.engine.cpu_head import logits_in_blocks


class Float32Head(torch.nn.Module):
    """The product of a linear head, not rounded to its dtype. Holds the head's own parameters."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> float32 [..., V], without a float32 copy of the weights."""
        rows_RH = hidden.reshape(-1, hidden.shape[-1])
        if rows_RH.is_cuda:
            logits_RV = torch.mm(rows_RH, self.weight.t(), out_dtype=torch.float32)
            if self.bias is not None:
                logits_RV = logits_RV + self.bias.float()
        else:
            logits_RV = logits_in_blocks(rows_RH, self.weight, self.bias)
        return logits_RV.reshape(*hidden.shape[:-1], -1)


def widen_head(model: PreTrainedModel) -> None:
    """In place. A head that is no plain layer of half precision, a quantised one for instance, is
    left as it is."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.weight.dtype in (torch.bfloat16, torch.float16):
        model.set_output_embeddings(cast("torch.nn.Linear", Float32Head(head)))
