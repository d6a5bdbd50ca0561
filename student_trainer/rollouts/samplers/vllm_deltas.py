"""What vLLM says of a rollout, as deltas: arrays of tokens, their log-probs, and why it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from student_trainer.errors import SamplerError
from student_trainer.records import Delta, Finish

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput

_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.TRUNCATED}


def finish_of(request_id: str, reason: str | None) -> Finish | None:
    """Why a generation ended; None for one that goes on. Raises SamplerError.

    vLLM's "error" is a request that it gave up. "repetition" is a stop of its detection of loops,
    which only a request that asks for it has: a rollout that ends by it would be neither the
    student's end nor the budget's.
    """
    if reason is None:
        return None
    if reason not in _FINISH:
        raise SamplerError(
            f"vLLM ended the generation {request_id} with the reason {reason!r}, which is neither "
            f"the student's end nor the budget's; known are {', '.join(_FINISH)}"
        )
    return _FINISH[reason]


def delta_of(request_id: str, output: CompletionOutput, num_topk: int) -> Delta:
    """Arrays of one vLLM output."""
    num_tokens = len(output.token_ids)
    width = num_topk + 1
    flat = cast("FlatLogprobs", output.logprobs)
    if num_tokens == 0:
        ids, logprobs = np.empty((0, width), np.int32), np.empty((0, width), np.float32)
    elif len(flat.token_ids) == num_tokens * width:
        # Row layout: the sampled token, then ranks 1..J.
        ids = np.asarray(flat.token_ids, np.int32).reshape(num_tokens, width)
        logprobs = np.asarray(flat.logprobs, np.float32).reshape(num_tokens, width)
    else:
        ids, logprobs = merged_rows(flat, num_tokens, width)
    return Delta(
        token_ids=np.asarray(output.token_ids, np.int32),
        logprobs=logprobs[:, 0],
        topk_ids=ids[:, 1:],
        topk_logprobs=logprobs[:, 1:],
        finish=finish_of(request_id, output.finish_reason),
    )


def merged_rows(
    flat: FlatLogprobs, num_tokens: int, width: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Rows of deltas that vLLM merged because they were not fetched in time.

    Merging drops the duplicate of a sampled token that is also in the top-k, so rows are ragged;
    the ranks put them back in order.
    """
    ids = np.empty((num_tokens, width), np.int32)
    logprobs = np.empty((num_tokens, width), np.float32)
    for row, (start, end) in enumerate(zip(flat.start_indices, flat.end_indices, strict=True)):
        entries = range(start, end)
        ranked = (
            sorted(entries, key=lambda i: cast("int", flat.ranks[i]))
            if end - start < width
            else entries[1:]
        )
        order = [start, *ranked]
        ids[row] = [flat.token_ids[i] for i in order]
        logprobs[row] = [flat.logprobs[i] for i in order]
    return ids, logprobs
