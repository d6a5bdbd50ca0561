"""Divergence, position weights and mask meet here only; sums come back, so splitting is exact.

Shape legend: B = sequences, T = response positions, K = teacher support, J = student top-k.
Index t is the t-th response token; nats; masked positions hold 0.0 and never reach a sum.

A step over any number of micro-batches and processes:

    for inputs in micro_batches:
        sums = objective(inputs, divergence=divergence, weights=weights)
        sums.loss_sum.backward()
        parts.append(sums.detached())
    totals = sum_over_processes(merge(parts))
    normalize = needs_normalization(weights)
    scale = step_scale(totals.weight_sum.item(), totals.num_tokens.item(), normalize)
    # sum every gradient over processes, multiply it by scale, then clip, then step

Weights are detached and their mean is one number per step, so scaling the accumulated gradient of
sum(m w l) by 1 / sum(m w) is mean-normalising the weights over the whole step (BPDG eq. 3-4, with
epsilon = 0), without a second forward. Nothing here knows settings, records or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .divergences import reverse_kl_monitor
from .inputs import LossInputs
from .weight_choice import PositionWeight
from .weights import combine

Divergence = Callable[[LossInputs], Tensor]
"""[B, T], with gradient: a class of `divergences` or `policy_gradients`, or any such function."""


def needs_normalization(weights: Sequence[PositionWeight]) -> bool:
    """Whether a step divides by the sum of its weights rather than by its number of tokens.

    Each method alone as published or as its `normalize` says: gates and hard selections of tokens
    do, Prune-OPD and IW-OPD do not (their weights raise the learning rate by up to half). More than
    one: the product is normalised.
    """
    return len(weights) > 1 or any(w.mean_normalized for w in weights)


def step_scale(weight_sum_total: float, num_tokens_total: float, normalize: bool) -> float:
    """The factor for the gradients accumulated from every `loss_sum` of an optimiser step.

    1 / sum(m w) if normalised, else 1 / sum(m); 0.0 where the sum is zero, as then nothing
    contributes. Both totals run over all micro-batches and all processes of the step.
    """
    for name, value in (("weight_sum", weight_sum_total), ("num_tokens", num_tokens_total)):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name}_total must be finite and >= 0, got {value}")
    denominator = weight_sum_total if normalize else num_tokens_total
    return 1.0 / denominator if denominator > 0.0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepSums:
    """Sums over the valid tokens of one micro-batch, or of several after `merge`; 0-dim tensors."""

    loss_sum: Tensor
    """sum of m w l, carries the graph."""
    weight_sum: Tensor
    """sum of m w, float64."""
    num_tokens: Tensor
    """sum of m, float64."""
    weight_min: Tensor
    """+inf if there is no valid token."""
    weight_max: Tensor
    """-inf if there is no valid token."""
    monitor_sums: dict[str, Tensor]
    """name -> sum over valid tokens of what `monitors` returned, float64."""

    def detached(self) -> StepSums:
        """The same without the graph."""
        return replace(self, loss_sum=self.loss_sum.detach())

    def metrics(self, *, normalize: bool) -> dict[str, float]:
        """Means to log; without a valid token only `loss` (0.0) and `num_tokens` (0.0)."""
        num_tokens, weight_sum = self.num_tokens.item(), self.weight_sum.item()
        loss = self.loss_sum.item() * step_scale(weight_sum, num_tokens, normalize)
        if num_tokens == 0.0:
            return {"loss": 0.0, "loss_tokens": 0.0}
        means = {name: value.item() / num_tokens for name, value in self.monitor_sums.items()}
        return {
            "loss": loss,
            "loss_tokens": num_tokens,
            "weight_mean": weight_sum / num_tokens,
            "weight_min": self.weight_min.item(),
            "weight_max": self.weight_max.item(),
            **means,
        }


def merge(parts: Sequence[StepSums]) -> StepSums:
    """The sums of a step from those of its micro-batches, which must monitor the same names."""
    names = {frozenset(part.monitor_sums) for part in parts}
    if len(names) != 1:
        raise ValueError(f"expected one set of monitors, got {sorted(map(sorted, names))}")
    return StepSums(
        loss_sum=torch.stack([part.loss_sum for part in parts]).sum(),
        weight_sum=torch.stack([part.weight_sum for part in parts]).sum(),
        num_tokens=torch.stack([part.num_tokens for part in parts]).sum(),
        weight_min=torch.stack([part.weight_min for part in parts]).amin(),
        weight_max=torch.stack([part.weight_max for part in parts]).amax(),
        monitor_sums={
            name: torch.stack([part.monitor_sums[name] for part in parts]).sum()
            for name in parts[0].monitor_sums
        },
    )


def sum_over_processes(sums: StepSums) -> StepSums:
    """The sums over every process of torch.distributed's default group; unchanged without one.

    With these totals, and gradients summed likewise, the step of several processes is that of one
    process with all of their sequences. Every process calls it once a step with the same weights
    and divergence, hence the same monitors.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    names = sorted(sums.monitor_sums)
    totals = torch.stack(
        [
            value.detach().double()
            for value in (
                sums.loss_sum,
                sums.weight_sum,
                sums.num_tokens,
                *(sums.monitor_sums[name] for name in names),
            )
        ]
    )
    weight_min, weight_max = sums.weight_min.clone(), sums.weight_max.clone()
    dist.all_reduce(totals, op=dist.ReduceOp.SUM)
    dist.all_reduce(weight_min, op=dist.ReduceOp.MIN)
    dist.all_reduce(weight_max, op=dist.ReduceOp.MAX)
    loss_sum, weight_sum, num_tokens, *monitor_sums = totals.unbind()
    return StepSums(
        loss_sum=loss_sum.to(sums.loss_sum.dtype),
        weight_sum=weight_sum,
        num_tokens=num_tokens,
        weight_min=weight_min,
        weight_max=weight_max,
        monitor_sums=dict(zip(names, monitor_sums, strict=True)),
    )


def monitors(inputs: LossInputs) -> dict[str, Tensor]:
    """Per-token quantities whose mean to log, [B, T], detached; only those the inputs allow.

    reverse_kl: sampled estimate of KL(behavior || teacher). *_mass_at_*: probability mass on a
    support.
    """
    found = {
        "reverse_kl": reverse_kl_monitor(inputs.behavior_logprobs_BT, inputs.teacher_logprobs_BT)
    }
    masses: dict[str, Tensor | None] = {}
    if (teachers := inputs.teacher_topk) is not None:
        masses["student_mass_at_teacher_topk"] = teachers.student_logprobs_BTN
        masses["teacher_mass_at_teacher_topk"] = teachers.teacher_logprobs_BTN
    if (students := inputs.student_topk) is not None:
        masses["behavior_mass_at_student_topk"] = students.behavior_logprobs_BTN
        masses["teacher_mass_at_student_topk"] = students.teacher_logprobs_BTN
    return found | {
        name: logprobs_BTN.detach().exp().sum(dim=-1)
        for name, logprobs_BTN in masses.items()
        if logprobs_BTN is not None
    }


def objective(
    inputs: LossInputs,
    *,
    divergence: Divergence,
    weights: Sequence[PositionWeight] = (),
    loss_weights_B: Tensor | None = None,
    noted: Callable[[Tensor], None] | None = None,
) -> StepSums:
    """The micro-batch's sums of m w l, m w and m, and what to log; call `.loss_sum.backward()`.

    `loss_weights_B` multiply l, sequence by sequence, and nothing else: how much a teacher counts
    against another. `noted` is given w [B, T], 0.0 where masked. With no valid token, or weights
    that are all zero, loss_sum is 0.0 with zero gradients.

    Raises:
        ValueError: a tensor that the divergence or a weight needs is absent, or shapes disagree.
    """
    mask_BT = inputs.mask_BT
    loss_BT = divergence(inputs)
    if weights:
        weight_BT = combine(*(weight(inputs) for weight in weights))
    else:
        weight_BT = mask_BT.to(loss_BT.dtype)
    for name, tensor in (("the divergence", loss_BT), ("the weights", weight_BT)):
        if tensor.shape != mask_BT.shape:
            raise ValueError(
                f"{name} returned {tuple(tensor.shape)}, mask_BT has {tuple(mask_BT.shape)}"
            )
    if loss_weights_B is not None:
        loss_BT = loss_BT * loss_weights_B.to(loss_BT.dtype).unsqueeze(-1)
    weight_BT = weight_BT.to(loss_BT.dtype)
    if noted is not None:
        noted(weight_BT)
    infinity = weight_BT.new_full((1,), math.inf)
    low = torch.where(mask_BT, weight_BT, math.inf).flatten()
    high = torch.where(mask_BT, weight_BT, -math.inf).flatten()
    return StepSums(
        loss_sum=torch.where(mask_BT, loss_BT * weight_BT, 0.0).sum(),
        weight_sum=_masked_sum(weight_BT, mask_BT),
        num_tokens=mask_BT.sum().double(),
        weight_min=torch.cat([low, infinity]).amin(),
        weight_max=torch.cat([high, -infinity]).amax(),
        monitor_sums={
            name: _masked_sum(value_BT, mask_BT) for name, value_BT in monitors(inputs).items()
        },
    )


def _masked_sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT.double(), 0.0).sum()
