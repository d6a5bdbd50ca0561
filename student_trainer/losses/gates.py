"""Weights of the student's own drift since the rollout: [B, T], detached, 0.0 where masked.

Shape legend: B = sequences, T = response positions. Index t is the t-th response token; nats.

All are about d_t = log p_student - log p_behavior of the sampled token. Both count valid tokens
only and normalise nothing: a gate is divided by its mean at the step (`objective.step_scale`), an
importance ratio is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_log_probs, check_mask
from .policy_gradients import MAX_LOG_RATIO


def _drift(student_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """d, detached, 0.0 where masked."""
    student_logprobs_BT = student_logprobs_BT.detach()
    check_log_probs(
        2,
        student={"student_logprobs_BT": student_logprobs_BT},
        fixed={"behavior_logprobs_BT": behavior_logprobs_BT},
    )
    check_mask(mask_BT, student_logprobs_BT=student_logprobs_BT)
    return torch.where(mask_BT, student_logprobs_BT - behavior_logprobs_BT, 0.0)


def span_gates(
    student_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    mask_BT: Tensor,
    span_BT: Tensor,
    *,
    tau: float,
    aggregate: str,
) -> Tensor:
    """g = exp(-tau |s|) in (0, 1], s the aggregate of d over the token's span.

    arXiv 2606.24084 (BPDG), eq. 1-2: signed mean, tau 1, blocks of 64 (`spans.block_spans`); raw,
    that is before the division by the mean over valid tokens (eq. 3; `objective.step_scale`). All
    ones when the student is still the behaviour policy. The paper's behaviour log-probs are
    recomputed by the trainer before the first update. `mean_abs` and `rms` do not let opposite
    shifts cancel (the authors' own suggestion).

    Args:
        span_BT: int64 in [0, T), the same number for tokens of one span (`spans`); its average is
            over valid tokens.
    """
    drift_BT = _drift(student_logprobs_BT, behavior_logprobs_BT, mask_BT)
    check_mask(mask_BT, span_BT=span_BT)
    size_BT = _span_sums(mask_BT.to(drift_BT.dtype), span_BT).clamp(min=1.0)
    if aggregate == "signed_mean":
        shift_BT = (_span_sums(drift_BT, span_BT) / size_BT).abs()
    elif aggregate == "mean_abs":
        shift_BT = _span_sums(drift_BT.abs(), span_BT) / size_BT
    else:
        shift_BT = (_span_sums(drift_BT.square(), span_BT) / size_BT).sqrt()
    return torch.where(mask_BT, torch.exp(-tau * shift_BT), 0.0)


def _span_sums(values_BT: Tensor, span_BT: Tensor) -> Tensor:
    """[B, T]: at every position the sum over its span."""
    return torch.zeros_like(values_BT).scatter_add(-1, span_BT, values_BT).gather(-1, span_BT)


def importance_ratios(
    student_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    mode: str,
    granularity: str,
    min_ratio: float,
    max_ratio: float,
) -> Tensor:
    """p_student / p_behavior of the sampled token, bounded: corrects a loss for stale rollouts.

    "truncate": min(ratio, max_ratio), the token-level rollout correction of verl (threshold 5 in
    arXiv 2606.22600, Table 6); min_ratio is not read. "mask": the ratio inside [min_ratio,
    max_ratio], 0 outside. Granularity "sequence" gives every valid token of a response the product
    of their ratios, "geometric" their geometric mean, as verl's levels of these names. Not for a
    divergence whose surrogate already has the ratio.

    Departure: verl compares the trainer's and the sampler's log-probs of one policy; here the
    student that is being updated stands in the numerator, so that staleness and the mismatch of the
    engines are corrected together. Log-ratios are clamped to +-20 nats.
    """
    log_ratio_BT = _drift(student_logprobs_BT, behavior_logprobs_BT, mask_BT)
    if granularity != "token":
        log_B1 = log_ratio_BT.double().sum(dim=-1, keepdim=True)
        if granularity == "geometric":
            log_B1 = log_B1 / mask_BT.sum(dim=-1, keepdim=True).clamp(min=1)
        log_ratio_BT = log_B1.to(log_ratio_BT.dtype).expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "truncate":
        ratio_BT = ratio_BT.clamp(max=max_ratio)
    else:
        inside_BT = (ratio_BT >= min_ratio) & (ratio_BT <= max_ratio)
        ratio_BT = torch.where(inside_BT, ratio_BT, 0.0)
    return torch.where(mask_BT, ratio_BT, 0.0)
