"""Position weights: [B, T], detached, 0.0 where masked. How much a token counts, not its cost.

Shape legend: B = sequences, T = response positions. Index t is the t-th response token; nats.

Every weight counts valid tokens only: deleting a masked position, wherever it stands, changes no
other weight. Hence padding side cannot matter, and a masked special token moves neither the
bad-event count, nor the accumulated advantage, nor the blocks. Nothing here normalises over the
batch except `mean_normalize`; a step split into micro-batches normalises its gradient instead
(`objective.step_scale`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .divergences import check_log_probs

Aggregate = Literal["signed_mean", "mean_abs", "rms"]

RELIABILITY_EPSILON = 1e-8
"""Reliability up to this is zero (the Prune-OPD code's value; the paper gives none)."""


def _check_mask(mask_BT: Tensor, **others_BT: Tensor) -> None:
    if mask_BT.dtype != torch.bool or mask_BT.ndim != 2:
        raise ValueError(
            f"mask_BT must be bool with 2 axes, got {mask_BT.dtype} {tuple(mask_BT.shape)}"
        )
    for name, tensor in others_BT.items():
        if tensor.shape != mask_BT.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, mask_BT has shape {tuple(mask_BT.shape)}"
            )


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


def check_non_negative(name: str, value: float) -> None:
    """Raise ValueError unless value >= 0."""
    if not value >= 0.0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def check_block_gate(block_size: int, tau: float, aggregate: str) -> None:
    """Raise ValueError unless block_size >= 1, tau >= 0 and the aggregate is known."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    check_non_negative("tau", tau)
    if aggregate not in ("signed_mean", "mean_abs", "rms"):
        raise ValueError(f"aggregate must be signed_mean, mean_abs or rms, got {aggregate!r}")


def reliability(bad_events_BT: Tensor, mask_BT: Tensor, *, w_drop: float) -> Tensor:
    """R_t = clip(1 - w_drop * (bad events up to and including t), 0, 1), in [0, 1], float32.

    arXiv 2605.07804 (Prune-OPD), eq. 5-11. What a bad event is (there: fewer than 0.7 of the top-16
    shared with the teacher) is decided by whoever fills bad_events_BT. R is exactly 0.0 from event
    number ceil(1 / w_drop) on: computed in float64, and residues up to 1e-8 are snapped to 0.
    """
    check_fraction("w_drop", w_drop)
    _check_mask(mask_BT, bad_events_BT=bad_events_BT)
    if bad_events_BT.dtype != torch.bool:
        raise ValueError(f"bad_events_BT must be bool, got {bad_events_BT.dtype}")
    num_bad_BT = (bad_events_BT & mask_BT).cumsum(dim=-1).double()
    reliability_BT = 1.0 - w_drop * num_bad_BT
    keep_BT = mask_BT & (reliability_BT > RELIABILITY_EPSILON)
    return torch.where(keep_BT, reliability_BT, 0.0).float()


def prune_weights(
    bad_events_BT: Tensor, mask_BT: Tensor, *, w_drop: float, w_base: float
) -> Tensor:
    """L_t = R_t + w_base on valid tokens (arXiv 2605.07804).

    In [w_base, 1 + w_base], non-increasing. As published (w_drop 0.01, w_base 0.5) a clean token
    counts 1.5 and no token ever counts 0.
    """
    check_non_negative("w_base", w_base)
    reliability_BT = reliability(bad_events_BT, mask_BT, w_drop=w_drop)
    return torch.where(mask_BT, reliability_BT + w_base, 0.0)


def prefix_importance_weights(
    teacher_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    epsilon: float = 1e-8,
) -> Tensor:
    """w_t = 1 + gamma (1 - sum_{k<t} |A_k| / (sum_k |A_k| + epsilon)).

    A = log p_teacher - log p_behavior of the sampled token.     arXiv 2606.22600 (IW-OPD), eq. 17.
    In [1, 1 + gamma], 1 + gamma at the first valid token, non-increasing, and 1 + gamma everywhere
    if teacher and behaviour agree on every token. Needs the whole response. The denominator
    includes the last token, as in the released code; the paper's index stops before it. Departure:
    the prefix sum is taken by shifting in float64 instead of cumsum(d) - d, whose rounding breaks
    monotonicity.
    """
    check_non_negative("gamma", gamma)
    check_log_probs(
        2,
        student={},
        fixed={
            "teacher_logprobs_BT": teacher_logprobs_BT,
            "behavior_logprobs_BT": behavior_logprobs_BT,
        },
    )
    _check_mask(mask_BT, teacher_logprobs_BT=teacher_logprobs_BT)
    gap_BT = (teacher_logprobs_BT.double() - behavior_logprobs_BT.double()).abs()
    gap_BT = torch.where(mask_BT, gap_BT, 0.0)
    before_BT = torch.nn.functional.pad(gap_BT, (1, 0)).cumsum(dim=-1)[:, :-1]
    remaining_BT = 1.0 - before_BT / (gap_BT.sum(dim=-1, keepdim=True) + epsilon)
    weight_BT = 1.0 + gamma * remaining_BT.clamp(0.0, 1.0)
    return torch.where(mask_BT, weight_BT, 0.0).to(teacher_logprobs_BT.dtype)


def block_gates(
    student_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    block_size: int,
    tau: float,
    aggregate: Aggregate,
) -> Tensor:
    """g = exp(-tau |s|) in (0, 1], s the block's aggregate of log p_student - log p_behavior.

    arXiv 2606.24084 (BPDG), eq. 1-2: block_size 64, tau 1, signed mean; raw, that is before the
    division by the mean over valid tokens (eq. 3; `mean_normalize`, or `objective.step_scale` for a
    step in several micro-batches). All ones when the student is still the behaviour policy. The
    paper's behaviour log-probs are recomputed by the trainer before the first update.

    Where the paper is silent: the last, partial block averages over its own valid tokens, and a
    block is block_size consecutive *valid* tokens, so masked ones take no place in it. `mean_abs`
    and `rms` do not let opposite shifts cancel (the authors' own suggestion).
    """
    check_block_gate(block_size, tau, aggregate)
    student_logprobs_BT = student_logprobs_BT.detach()
    check_log_probs(
        2,
        student={"student_logprobs_BT": student_logprobs_BT},
        fixed={"behavior_logprobs_BT": behavior_logprobs_BT},
    )
    _check_mask(mask_BT, student_logprobs_BT=student_logprobs_BT)
    drift_BT = torch.where(mask_BT, student_logprobs_BT - behavior_logprobs_BT, 0.0)
    block_BT = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0) // block_size
    size_BT = _block_sums(mask_BT.to(drift_BT.dtype), block_BT).clamp(min=1.0)
    if aggregate == "signed_mean":
        shift_BT = (_block_sums(drift_BT, block_BT) / size_BT).abs()
    elif aggregate == "mean_abs":
        shift_BT = _block_sums(drift_BT.abs(), block_BT) / size_BT
    else:
        shift_BT = (_block_sums(drift_BT.square(), block_BT) / size_BT).sqrt()
    return torch.where(mask_BT, torch.exp(-tau * shift_BT), 0.0)


def _block_sums(values_BT: Tensor, block_BT: Tensor) -> Tensor:
    """[B, T]: at every position the sum over its block."""
    return torch.zeros_like(values_BT).scatter_add(-1, block_BT, values_BT).gather(-1, block_BT)


def mean_normalize(weight_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The weights divided by their mean over valid tokens; all zeros if they sum to zero.

    Exact for one whole batch. Over micro-batches it would normalise each by its own mean.
    """
    _check_mask(mask_BT, weight_BT=weight_BT)
    weight_BT = torch.where(mask_BT, weight_BT.detach(), 0.0)
    total = weight_BT.sum(dtype=torch.float64)
    scale = torch.where(total > 0, mask_BT.sum() / total, 0.0)
    return weight_BT * scale.to(weight_BT.dtype)


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
