"""What a student says of a prompt's continuation, for whoever checks that its weights arrived.

Temperature 1, float32 [T], one number a token of the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from student_trainer.learner.families import plain_logits
from student_trainer.learner.sharding import give_back_the_ends
from student_trainer.learner.student import student_forward
from teacher_wire.id_ranges import IdRanges, fill


def logprobs(
    model: PreTrainedModel,
    prompts: Sequence[NDArray[np.int32]],
    token_ids: Sequence[NDArray[np.int32]],
    *,
    dtype: torch.dtype,
    excluded_ids: IdRanges,
) -> list[NDArray[np.float32]]:
    """Of several prompts' continuations in one pass, as the learner computes."""
    pairs = zip(prompts, token_ids, strict=True)
    device = next(model.parameters()).device
    responses_BT = _padded(token_ids)
    lengths_B = torch.tensor([len(ids) for ids in token_ids])
    with torch.no_grad():
        gathered = student_forward(
            model,
            _padded([np.concatenate(pair) for pair in pairs]).to(device),
            torch.tensor([len(ids) for ids in prompts], device=device),
            responses_BT.to(device),
            (torch.arange(responses_BT.shape[1]) < lengths_B[:, None]).to(device),
            (),
            temperature=1.0,
            dtype=dtype,
            excluded_ids=excluded_ids,
        )
    rows = zip(gathered.logprobs_BT.cpu().numpy(), lengths_B.tolist(), strict=True)
    return [row[:length] for row, length in rows]


def plain_logprobs(
    model: PreTrainedModel,
    prompt_ids: NDArray[np.int32],
    token_ids: NDArray[np.int32],
    *,
    excluded_ids: IdRanges,
) -> NDArray[np.float32]:
    """Of plain `model(ids).logits`: eager attention, evaluation mode, float32."""
    device = next(model.parameters()).device
    ids_S = torch.from_numpy(np.concatenate([prompt_ids, token_ids])).long().to(device)
    rows = len(token_ids) + 1
    with torch.no_grad():
        logits_SV = plain_logits(model, ids_S.unsqueeze(0), num_last=rows)[0]
    give_back_the_ends(model)
    logits_TV = logits_SV[-rows:-1].float()
    fill(logits_TV, excluded_ids, -torch.inf)
    found: NDArray[np.float32] = (
        logits_TV.log_softmax(-1).gather(1, ids_S[len(prompt_ids) :, None])[:, 0].cpu().numpy()
    )
    return found


def _padded(arrays: Sequence[NDArray[np.int32]]) -> torch.Tensor:
    """[B, T] ids, with zeros behind those of a shorter one."""
    ids = [torch.from_numpy(array).long() for array in arrays]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
