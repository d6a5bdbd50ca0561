"""The student under training: forward, gather. The one place where logits are shifted.

Legend: B = sequences, S = prompt plus response positions (padded), T = response positions (padded),
R = response positions of all sequences in one row list, N = ids gathered a position, V =
vocabulary.

The model's output at position s is its distribution for the token at s + 1. `response_hidden` takes
the outputs from the last prompt token on, so that row t of everything below belongs to response
token t. Nothing else in the package subtracts one from an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

HEAD_CHUNK_LOGITS = 1 << 26
"""Logits held at once, in elements (256 MiB of float32); longer lists of rows are recomputed in
chunks during the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Log-probs of the student at the ids it was asked for, with gradient. Padding holds 0.0."""

    logprobs_BT: Tensor
    """[B, T] of the response tokens."""
    logprobs_at_BTN: tuple[Tensor, ...]
    """One [B, T, N] for each array of ids asked for."""
    entropy_BT: Tensor
    """[B, T] nats, no gradient."""


def student_forward(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    prompt_lengths_B: Tensor,
    response_ids_BT: Tensor,
    response_mask_BT: Tensor,
    gather_ids_BTN: Sequence[Tensor],
    *,
    temperature: float,
) -> Gathered:
    """Log-probs of the response tokens and of further ids at every response position.

    Sequences are padded on the right. Normalised over the full vocabulary at `temperature`, in
    float32 whatever the model computes in. `response_mask_BT` is True for real response tokens.
    """
    hidden_BSD = model.model(
        input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False
    ).last_hidden_state
    hidden_RD = response_hidden(hidden_BSD, prompt_lengths_B, response_mask_BT)
    ids_RN = torch.cat(
        [
            response_ids_BT[response_mask_BT].unsqueeze(-1),
            *(ids_BTN[response_mask_BT] for ids_BTN in gather_ids_BTN),
        ],
        dim=-1,
    )
    logprobs_RN, entropy_R = _chunked_head(model.lm_head, hidden_RD, ids_RN, temperature)

    def unpack(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(*response_mask_BT.shape, *rows.shape[1:])
        return padded.masked_scatter(
            response_mask_BT.reshape(*response_mask_BT.shape, *[1] * (rows.dim() - 1)).expand_as(
                padded
            ),
            rows,
        )

    own, *others = logprobs_RN.split([1, *(ids.shape[-1] for ids in gather_ids_BTN)], dim=-1)
    return Gathered(
        logprobs_BT=unpack(own.squeeze(-1)),
        logprobs_at_BTN=tuple(unpack(rows) for rows in others),
        entropy_BT=unpack(entropy_R),
    )


def response_hidden(
    hidden_BSD: Tensor, prompt_lengths_B: Tensor, response_mask_BT: Tensor
) -> Tensor:
    """[R, D] hidden states that predict the response tokens, row by row. THE shift by one."""
    sequences, positions = response_mask_BT.nonzero(as_tuple=True)
    return hidden_BSD[sequences, prompt_lengths_B[sequences] + positions - 1]


def _chunked_head(
    head: torch.nn.Module, hidden_RD: Tensor, ids_RN: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs [R, N] at ids and entropies [R], without ever holding all [R, V] logits."""
    num_rows, vocab_size = len(hidden_RD), cast("Tensor", head.weight).shape[0]
    chunk = max(1, HEAD_CHUNK_LOGITS // vocab_size)
    if num_rows <= chunk:
        return _head_rows(head, hidden_RD, ids_RN, temperature)
    parts = [
        checkpoint(
            _head_rows,
            head,
            hidden_RD[start : start + chunk],
            ids_RN[start : start + chunk],
            temperature,
            use_reentrant=False,
        )
        for start in range(0, num_rows, chunk)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _head_rows(
    head: torch.nn.Module, hidden_RD: Tensor, ids_RN: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_RV = head(hidden_RD).float() / temperature
    lse_R = torch.logsumexp(logits_RV, dim=-1)
    logprobs_RN = logits_RV.gather(-1, ids_RN) - lse_R.unsqueeze(-1)
    with torch.no_grad():
        probs_RV = torch.exp(logits_RV - lse_R.unsqueeze(-1))
        entropy_R = torch.special.entr(probs_RV).sum(-1)  # 0 where a logit is -inf
    return logprobs_RN, entropy_R
