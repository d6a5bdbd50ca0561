"""IW-OPD's prefix weights and the alternatives of its ablation: [B, T], detached, 0.0 where masked.

Shape legend: B = sequences, T = response positions. Index t is the t-th response token; nats.

arXiv 2606.22600. A_t = log p_teacher - log p_behavior of the sampled token; sums run over valid
tokens only. `prefix_importance_weights` is the method (eq. 17), everything else a row of its Table
4 or, where said, ours. Each takes the A of `sampled_advantages`. Float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_log_probs, check_mask
from .policy_gradients import MAX_LOG_RATIO
from .weights import elapsed_shares, position_window, sample_mean_normalize

SHARE_EPSILON = 1e-8
"""Added to the total advantage (the released code's value); a signed total this small is none."""


def sampled_advantages(
    teacher_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    max_gap_nats: float | None = None,
) -> Tensor:
    """A_t, float64, 0.0 where masked; clipped to +-max_gap_nats where given.

    The clip is ours and off by default: it keeps one token of -58 nats from taking the whole
    response's share. It is for the sums of this file, never for the loss.
    """
    check_log_probs(
        2,
        student={},
        fixed={
            "teacher_logprobs_BT": teacher_logprobs_BT,
            "behavior_logprobs_BT": behavior_logprobs_BT,
        },
    )
    check_mask(mask_BT, teacher_logprobs_BT=teacher_logprobs_BT)
    advantage_BT = teacher_logprobs_BT.double() - behavior_logprobs_BT.double()
    if max_gap_nats is not None:
        advantage_BT = advantage_BT.clamp(-max_gap_nats, max_gap_nats)
    return torch.where(mask_BT, advantage_BT, 0.0)


def _sums_before(values_BT: Tensor) -> Tensor:
    """sum_{k<t}, by shifting: cumsum(v) - v rounds, which breaks monotonicity."""
    return torch.nn.functional.pad(values_BT, (1, 0)).cumsum(dim=-1)[:, :-1]


def remaining_shares(advantage_BT: Tensor, *, epsilon: float = SHARE_EPSILON) -> Tensor:
    """1 - sum_{k<t} |A_k| / (sum_k |A_k| + epsilon), in [0, 1], non-increasing, 1 at the start."""
    gap_BT = advantage_BT.abs()
    total_B1 = gap_BT.sum(dim=-1, keepdim=True) + epsilon
    return (1.0 - _sums_before(gap_BT) / total_B1).clamp(0.0, 1.0)


def signed_remaining_shares(advantage_BT: Tensor, *, epsilon: float = SHARE_EPSILON) -> Tensor:
    """1 - sum_{k<t} A_k / sum_k A_k, clamped to [0, 1]; 1 at the start, not monotone.

    Unlike absolute ones, signed prefix sums can leave the interval from 0 to their total, whence
    the clamp. A total within epsilon of zero has no shares: 1 everywhere, which is what
    `remaining_shares` gives where every A is zero.
    """
    total_B1 = advantage_BT.sum(dim=-1, keepdim=True)
    has_total_B1 = total_B1.abs() > epsilon
    share_BT = _sums_before(advantage_BT) / torch.where(has_total_B1, total_B1, 1.0)
    return torch.where(has_total_B1, (1.0 - share_BT).clamp(0.0, 1.0), 1.0)


def prefix_importance_weights(advantage_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """w_t = 1 + gamma (1 - sum_{k<t} |A_k| / (sum_k |A_k| + epsilon)): IW-OPD, eq. 17.

    In [1, 1 + gamma], 1 + gamma at the first valid token, non-increasing, and 1 + gamma everywhere
    if teacher and behaviour agree on every token. Needs the whole kept response. The denominator
    includes the last token, as in the released code; the paper's index stops before it. Departure:
    the prefix sum is taken by shifting in float64 instead of cumsum(d) - d, whose rounding breaks
    monotonicity.
    """
    weight_BT = 1.0 + gamma * remaining_shares(advantage_BT)
    return torch.where(mask_BT, weight_BT, 0.0)


def signed_importance_weights(advantage_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """1 + gamma * signed_remaining_shares(A), in [1, 1 + gamma]: Table 4's signed sums."""
    weight_BT = 1.0 + gamma * signed_remaining_shares(advantage_BT)
    return torch.where(mask_BT, weight_BT, 0.0)


def surrogate_only_weights(advantage_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The remaining share alone, not blended with 1; in [0, 1], 1 at the first valid token."""
    return torch.where(mask_BT, remaining_shares(advantage_BT), 0.0)


def linear_weights(mask_BT: Tensor, *, gamma: float) -> Tensor:
    """1 + gamma (1 - t / n), t of n valid tokens from 0. What eq. 17 is for equal |A|."""
    return torch.where(mask_BT, 1.0 + gamma * (1.0 - elapsed_shares(mask_BT)), 0.0)


def fixed_prefix_weights(mask_BT: Tensor, *, gamma: float, prefix_share: float) -> Tensor:
    """1 + gamma on the first `prefix_share` of the valid tokens, 1 on the others."""
    inside_BT = position_window(mask_BT, start_share=0.0, end_share=prefix_share)
    return torch.where(mask_BT, 1.0 + gamma * inside_BT.double(), 0.0)


def annealed_share(prefix_share: float, progress: float) -> float:
    """Share of a response that is amplified after the share `progress` of all steps: from
    prefix_share to 1 along half a cosine, as the released code of IW-OPD has it (0.3 there, with a
    gamma of 0.5)."""
    return prefix_share + (1.0 - prefix_share) * 0.5 * (1.0 - math.cos(math.pi * progress))


def ideal_ratio_weights(advantage_BT: Tensor, mask_BT: Tensor, *, alpha: float) -> Tensor:
    """r_t = exp(alpha sum_{k<t} A_k) = (p_teacher(y_<t) / p_behavior(y_<t))^alpha; 1 at the start.

    The log is clamped to +-20 nats. Raw: the paper's weight is r_t / Z_t, Z_t = E[r_t] over
    responses at position t. Departure: divided at the step by one mean over all its valid tokens
    (`objective.step_scale`), since few responses reach the same t.
    """
    log_ratio_BT = (alpha * _sums_before(advantage_BT)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(mask_BT, log_ratio_BT.exp(), 0.0)


def ideal_blend_weights(
    advantage_BT: Tensor, mask_BT: Tensor, *, alpha: float, gamma: float
) -> Tensor:
    """1 + gamma r_t / mean(r), r as in `ideal_ratio_weights`, the mean over the same response.

    Table 4 has the row and no formula: this blend is ours, made like eq. 17's. The mean is by
    response because a sum with 1 cannot be divided by the step's mean afterwards. In [1, 1 + gamma
    n] for n valid tokens, of mean 1 + gamma.
    """
    ratio_BT = ideal_ratio_weights(advantage_BT, mask_BT, alpha=alpha)
    weight_BT = 1.0 + gamma * sample_mean_normalize(ratio_BT, mask_BT)
    return torch.where(mask_BT, weight_BT, 0.0)


def causal_weights(
    advantage_BT: Tensor, mask_BT: Tensor, *, gamma: float, tau_nats: float
) -> Tensor:
    """w_t = 1 + gamma exp(-sum_{k<t} |A_k| / tau_nats): ours, known when token t is sampled.

    In [1, 1 + gamma], 1 + gamma at the first valid token, non-increasing; a later token changes no
    earlier weight. tau_nats takes the place of the response's total: the median of sum |A| over
    earlier responses makes it comparable to eq. 17.
    """
    weight_BT = 1.0 + gamma * torch.exp(-_sums_before(advantage_BT.abs()) / tau_nats)
    return torch.where(mask_BT, weight_BT, 0.0)
