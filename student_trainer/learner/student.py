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
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from student_trainer.learner.families import decoder_of, head_of
from student_trainer.learner.head_logprobs import head_logprobs
from student_trainer.learner.sharding import through_hooks
from teacher_wire.id_ranges import IdRanges


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Log-probs of the student at the ids it was asked for, with gradient. Padding holds 0.0."""

    logprobs_BT: Tensor
    """[B, T] of the response tokens."""
    logprobs_at_BTN: tuple[Tensor, ...]
    """One [B, T, N] for each array of ids asked for."""
    entropy_BT: Tensor
    """[B, T] nats, no gradient."""
    log_outside_BT: Tensor | None = None
    """[B, T] log of the mass outside the support that was asked for, with gradient; -inf where the
    support is the whole vocabulary."""


def student_forward(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    prompt_lengths_B: Tensor,
    response_ids_BT: Tensor,
    response_mask_BT: Tensor,
    gather_ids_BTN: Sequence[Tensor],
    *,
    temperature: float,
    dtype: torch.dtype = torch.float32,
    excluded_ids: IdRanges = (),
    support_BTN: Tensor | None = None,
) -> Gathered:
    """Log-probs of the response tokens and of further ids at every response position.

    Sequences are padded on the right and the model is causal, so that nothing real sees padding: a
    mask would only rule out the fused attention. Normalised at `temperature` over the vocabulary
    less `excluded_ids`, in float32 whatever `dtype` the model computes in; its weights stay as they
    are.
    `response_mask_BT` is True for real response tokens. `support_BTN` is True for those ids, the
    response token first, whose complement's mass is asked for.
    """
    ids_RN = torch.cat(
        [
            response_ids_BT[response_mask_BT].unsqueeze(-1),
            *(ids_BTN[response_mask_BT] for ids_BTN in gather_ids_BTN),
        ],
        dim=-1,
    )
    logprobs_RN, entropy_R, *log_outside_R = through_hooks(model, response_logprobs)(
        input_ids_BS,
        prompt_lengths_B,
        response_mask_BT,
        ids_RN,
        temperature=temperature,
        dtype=dtype,
        excluded_ids=excluded_ids,
        support_RN=None if support_BTN is None else support_BTN[response_mask_BT],
    )

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
        log_outside_BT=unpack(log_outside_R[0]) if log_outside_R else None,
    )


def response_logprobs(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    prompt_lengths_B: Tensor,
    response_mask_BT: Tensor,
    ids_RN: Tensor,
    *,
    temperature: float,
    dtype: torch.dtype,
    excluded_ids: IdRanges,
    support_RN: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Log-probs [R, N] at ids of the response positions that the mask keeps, entropies [R], and,
    given a support, the log [R] of the mass outside it.

    All that the learner asks of the model's weights.
    """
    # Without the cache of autocast: it would hold a copy of every weight until the end.
    with torch.autocast(
        input_ids_BS.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
    ):
        output = decoder_of(model)(input_ids=input_ids_BS, use_cache=False)
    hidden_BSD: Tensor = output.last_hidden_state
    return head_logprobs(
        replace(head_of(model), excluded_ids=excluded_ids),
        response_hidden(hidden_BSD, prompt_lengths_B, response_mask_BT),
        ids_RN,
        temperature=temperature,
        dtype=dtype,
        support_RN=support_RN,
    )


def response_hidden(
    hidden_BSD: Tensor, prompt_lengths_B: Tensor, response_mask_BT: Tensor
) -> Tensor:
    """[R, D] hidden states that predict the response tokens, row by row. THE shift by one."""
    sequences, positions = response_mask_BT.nonzero(as_tuple=True)
    return hidden_BSD[sequences, prompt_lengths_B[sequences] + positions - 1]
