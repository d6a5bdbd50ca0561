"""Position weights: [B, T], detached, 0.0 where masked. How much a token counts, not its cost.

Shape legend: B = sequences, T = response positions. Index t is the t-th response token; nats.

Every weight counts valid tokens only: deleting a masked position, wherever it stands, changes no
other weight. Hence padding side cannot matter, and a masked special token moves neither the
bad-event count, nor the accumulated advantage, nor the blocks. Here are the weights of drift and
position; `prefix_weights` has IW-OPD's, `gates` those of the student's own drift. Nothing
normalises over the batch: a step normalises its gradient instead (`objective.step_scale`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_wire.drift import reliability_by_count

from .checks import check_mask


def reliability(bad_events_BT: Tensor, mask_BT: Tensor, *, w_drop: float) -> Tensor:
    """R_t = clip(1 - w_drop * (bad events up to and including t), 0, 1), in [0, 1], float32.

    arXiv 2605.07804 (Prune-OPD), eq. 5-11; the numbers are those of `teacher_wire.drift`, by which
    the server stops a rollout, rounded to float32. What a bad event is (there: fewer than 0.7 of
    the top-16 shared with the teacher) is decided by whoever fills bad_events_BT. R is exactly 0.0
    from event number ceil(1 / w_drop) on.
    """
    check_mask(mask_BT, bad_events_BT=bad_events_BT)
    if bad_events_BT.dtype != torch.bool:
        raise ValueError(f"bad_events_BT must be bool, got {bad_events_BT.dtype}")
    by_count = torch.from_numpy(reliability_by_count(w_drop, bad_events_BT.shape[-1]))
    num_bad_BT = (bad_events_BT & mask_BT).cumsum(dim=-1).clamp(max=len(by_count) - 1)
    reliability_BT = by_count.to(mask_BT.device, torch.float32)[num_bad_BT]
    return torch.where(mask_BT, reliability_BT, 0.0)


def prune_weights(
    bad_events_BT: Tensor, mask_BT: Tensor, *, w_drop: float, w_base: float
) -> Tensor:
    """L_t = R_t + w_base on valid tokens (arXiv 2605.07804).

    In [w_base, 1 + w_base], non-increasing. As published (w_drop 0.01, w_base 0.5) a clean token
    counts 1.5 and no token ever counts 0.
    """
    reliability_BT = reliability(bad_events_BT, mask_BT, w_drop=w_drop)
    return torch.where(mask_BT, reliability_BT + w_base, 0.0)


def elapsed_shares(mask_BT: Tensor) -> Tensor:
    """t / n: the valid tokens before a position, over all n of its response; [B, T], float64.

    In [0, 1) on valid tokens, 0.0 where masked. One correctly rounded division, so that comparing
    it with a share written in decimals (0.3 of 10 tokens) is exact.
    """
    check_mask(mask_BT)
    before_BT = (mask_BT.cumsum(dim=-1) - mask_BT.long()).double()
    num_valid_B1 = mask_BT.sum(dim=-1, keepdim=True).clamp(min=1).double()
    return torch.where(mask_BT, before_BT / num_valid_B1, 0.0)


def position_window(mask_BT: Tensor, *, start_share: float, end_share: float) -> Tensor:
    """1.0 where start_share <= t / n < end_share, else 0.0; float32.

    t counts valid tokens from 0, n is their number in the kept response. Windows that meet cover
    every token once; one that does not start at 0 may hold no token of a short response.

    Source: the first- and last-30 % baselines of arXiv 2606.22600 (IW-OPD), which do not say how
    the share is rounded.
    """
    share_BT = elapsed_shares(mask_BT)
    return ((share_BT >= start_share) & (share_BT < end_share) & mask_BT).float()


def entropy_top_weights(entropies_BT: Tensor, mask_BT: Tensor, *, ratio: float) -> Tensor:
    """1.0 on the max(1, floor(ratio * n)) valid tokens of highest entropy of each response and on
    those as high as the last of them, else 0.0.

    n is the response's number of valid tokens. float32.

    Source: `entropy_top_ratio` of the released code of arXiv 2603.25562, whose README has 0.2 and
    whose paper does not mention it. Departure: there the entropies are from before the first update
    of a batch, here of the student as it is, which is the same with one update a batch.

    Args:
        entropies_BT: of the student's distributions, nats, no gradient; finite where valid.
        mask_BT: bool.
        ratio: in (0, 1]; 1 keeps every token.
    """
    check_mask(mask_BT, entropies_BT=entropies_BT)
    return highest_share(entropies_BT.detach(), mask_BT, ratio=ratio).float()


def highest_share(values_BT: Tensor, mask_BT: Tensor, *, ratio: float) -> Tensor:
    """bool [B, T]: the max(1, floor(ratio * n)) highest of each response's n valid values, and all
    that are as high as the last of them."""
    if not mask_BT.shape[1]:
        return torch.zeros_like(mask_BT)
    ranked_BT = torch.where(mask_BT, values_BT.double(), -torch.inf)
    num_kept_B1 = (mask_BT.sum(dim=-1, keepdim=True).double() * ratio).long().clamp(min=1)
    lowest_B1 = ranked_BT.sort(dim=-1, descending=True).values.gather(-1, num_kept_B1 - 1)
    return (ranked_BT >= lowest_B1) & mask_BT


def sample_mean_normalize(weight_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Each response's weights divided by their own mean over its valid tokens; zeros if all zero.

    By response, hence the same in any micro-batch.
    """
    check_mask(mask_BT, weight_BT=weight_BT)
    weight_BT = torch.where(mask_BT, weight_BT.detach(), 0.0)
    total_B1 = weight_BT.sum(dim=-1, keepdim=True, dtype=torch.float64)
    num_valid_B1 = mask_BT.sum(dim=-1, keepdim=True)
    scale_B1 = torch.where(total_B1 > 0, num_valid_B1 / total_B1, 0.0)
    return (weight_BT * scale_B1).to(weight_BT.dtype)


def combine(*weights_BT: Tensor) -> Tensor:
    """The product of one or more weights, detached. Normalising it is the caller's choice."""
    if not weights_BT:
        raise ValueError("combine needs at least one weight")
    product_BT = weights_BT[0].detach()
    for weight_BT in weights_BT[1:]:
        if weight_BT.shape != product_BT.shape:
            raise ValueError(
                f"weights of shapes {tuple(product_BT.shape)} and {tuple(weight_BT.shape)}"
            )
        product_BT = product_BT * weight_BT.detach()
    return product_BT
