"""Which span of its response a token is in: int64 [B, T], counted from 0, over valid tokens only.

Shape legend: B = sequences, T = response positions. Masked positions take no place in a span; their
own number means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_mask


def block_spans(mask_BT: Tensor, *, block_size: int) -> Tensor:
    """Blocks of block_size consecutive valid tokens; the last of a response may be shorter.

    Where BPDG is silent: a partial block is one too, and masked tokens take no place in a block.
    """
    check_mask(mask_BT)
    return (mask_BT.cumsum(dim=-1) - 1).clamp(min=0) // block_size


def newline_spans(
    response_ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    newline_ids: Sequence[int],
    min_span: int,
    max_span: int,
    block_size: int,
) -> Tensor:
    """Spans that end with a newline token; blocks of block_size in a response without one.

    From left to right, a span of fewer than min_span tokens is joined to the next one, the last to
    the one before. Then a span of more than max_span tokens is cut into the fewest parts of at most
    that many, equal but for one token. Hence min_span to max_span tokens each, unless the response
    has fewer than min_span.

    Source: NewlineSpan of arXiv 2606.24084 (BPDG), which merges, splits and falls back and gives no
    thresholds: the two lengths, the equal cut and the direction of joining are ours.

    Args:
        response_ids_BT: int64; masked positions may hold anything.
        newline_ids: every token whose text holds a newline.
    """
    check_mask(mask_BT, response_ids_BT=response_ids_BT)
    spans_BT = block_spans(mask_BT, block_size=block_size)
    is_newline_BT = torch.isin(response_ids_BT, response_ids_BT.new_tensor(list(newline_ids)))
    for row in (is_newline_BT & mask_BT).any(dim=-1).nonzero()[:, 0].tolist():
        keep_T = mask_BT[row]
        ends = (is_newline_BT[row][keep_T].nonzero()[:, 0] + 1).tolist()
        lengths = _span_lengths(ends, int(keep_T.sum()), min_span, max_span)
        numbers = torch.arange(len(lengths), device=spans_BT.device)
        repeats = torch.tensor(lengths, device=spans_BT.device)
        spans_BT[row, keep_T] = numbers.repeat_interleave(repeats)
    return spans_BT


def _span_lengths(ends: list[int], num_tokens: int, min_span: int, max_span: int) -> list[int]:
    """Lengths of the joined and cut spans; `ends` are counts of tokens up to each newline."""
    cuts = [0]
    for end in ends:
        if end - cuts[-1] >= min_span:
            cuts.append(end)
    if cuts[-1] < num_tokens:
        # What follows the last cut is a span of its own, or too short and joined to the one before.
        if num_tokens - cuts[-1] < min_span and len(cuts) > 1:
            cuts.pop()
        cuts.append(num_tokens)
    lengths = []
    for start, end in pairwise(cuts):
        num_parts = -(-(end - start) // max_span)
        bounds = [start + (end - start) * part // num_parts for part in range(num_parts + 1)]
        lengths += [high - low for low, high in pairwise(bounds)]
    return lengths
