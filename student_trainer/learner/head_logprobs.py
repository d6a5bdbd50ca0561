"""Log-probs of the head at a few ids of every row, without all logits at once.

Legend: R = rows, D = hidden size, V = vocabulary, N = ids a row.

Two passes. The first, without gradient, goes over blocks of rows and, within them, blocks of the
vocabulary, and keeps a running maximum, sum and entropy of the softmax; only hidden states, ids and
one number a row outlive it. The second makes every block again, turns it into its own gradient, and
adds the gradients of head and hidden state in place. A block is small enough to stay in a cache, so
that the memory needed does not grow with R or V. Rows whose loss is renormalised on their ids need
no second pass: there the softmax cancels, and the gradient is at the ids alone.

The mass outside some of the ids is a softmax sum of its own that leaves those ids out. 1 less their
probabilities would be the same number with an error of 1e-7, which is more than all of it where the
student is sure of a token, and without a gradient from there on.

The gradient of the head is added to `weight.grad` by the second pass itself: a second [V, D] for
autograd to add would be the largest tensor of a training step. `torch.autograd.grad` does not see
it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from student_trainer.learner.head import Head
from student_trainer.learner.logit_blocks import LogitBlocks, rounded
from teacher_wire.id_ranges import fill


def head_logprobs(
    head: Head,
    hidden_RD: Tensor,
    ids_RN: Tensor,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    support_RN: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Log-probs [R, N] at ids, with gradient, entropies [R] in nats, without, and, given a support,
    the log [R] of the mass outside it, with gradient. All float32.

    `dtype` is that of the products; the softmax is in float32 whatever it is. `support_RN` is True
    for the ids of the support; where they are all ids, the log is -inf and has no gradient.
    """
    logprobs_RN, log_outside_R, entropy_R = _TwoPasses.apply(  # type: ignore[no-untyped-call]
        hidden_RD, head.weight_VD, head.bias_V, ids_RN, support_RN, head, temperature, dtype
    )
    return (
        (logprobs_RN, entropy_R) if support_RN is None else (logprobs_RN, entropy_R, log_outside_R)
    )


def reference_logprobs(
    head: Head,
    hidden_RD: Tensor,
    ids_RN: Tensor,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    support_RN: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The same, obvious and slow: all logits at once. `head_logprobs` is tested against it."""
    weight, transform = rounded(head.weight_VD, dtype), head.transform
    logits_RV = rounded(hidden_RD, dtype).float() @ weight.float().T
    if head.bias_V is not None:
        logits_RV = logits_RV + head.bias_V
    logits_RV = logits_RV * transform.scale
    if transform.soft_cap is not None:
        logits_RV = transform.soft_cap * torch.tanh(logits_RV / transform.soft_cap)
    logits_RV = logits_RV / temperature
    if head.excluded_ids:
        left_out_V = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        fill(left_out_V, head.excluded_ids, True)
        logits_RV = logits_RV.masked_fill(left_out_V, -torch.inf)
    lse_R = torch.logsumexp(logits_RV, dim=-1)
    logprobs_RN = logits_RV.gather(-1, ids_RN) - lse_R.unsqueeze(-1)
    with torch.no_grad():
        probs_RV = torch.exp(logits_RV - lse_R.unsqueeze(-1))
        entropy_R = torch.special.entr(probs_RV).sum(-1)  # 0 where a logit is -inf
    if support_RN is None:
        return logprobs_RN, entropy_R
    inside_RV = torch.zeros_like(logits_RV).scatter_add(-1, ids_RN, support_RN.float()) > 0
    outside_RV = logits_RV.masked_fill(inside_RV, -torch.inf)
    is_there_R = outside_RV.isfinite().any(-1)
    outside_RV = torch.where(is_there_R.unsqueeze(-1), outside_RV, 0.0)  # no NaN in its gradient
    log_outside_R = torch.where(is_there_R, torch.logsumexp(outside_RV, dim=-1) - lse_R, -torch.inf)
    return logprobs_RN, entropy_R, log_outside_R


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_RN: Tensor,
        support_RN: Tensor | None,
        head: Head,
        temperature: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert weight_VD.is_leaf, "the gradient is added to the weight's own"
        ctx.weight, ctx.bias = weight_VD, bias_V
        head = replace(head, weight_VD=weight_VD.detach())
        blocks = LogitBlocks(head, hidden_RD.detach(), ids_RN, support_RN, temperature, dtype)
        with torch.autocast(hidden_RD.device.type, enabled=False):
            logprobs_RN, lse_R, outside_lse_R, entropy_R = blocks.first_pass()
        ctx.blocks = blocks
        # Not by ctx.save_for_backward: the blocks hold hidden states and ids already.
        ctx.lse_R, ctx.outside_lse_R = lse_R, outside_lse_R
        ctx.mark_non_differentiable(entropy_R)
        return logprobs_RN, outside_lse_R - lse_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        blocks: LogitBlocks = ctx.blocks
        grad_RN, lse_R = gradients[0].float(), ctx.lse_R
        nothing_R = ctx.outside_lse_R.isinf()
        outside_grad_R = gradients[1].float().masked_fill(nothing_R, 0.0)
        outside_lse_R = ctx.outside_lse_R.masked_fill(nothing_R, torch.inf)
        hidden_grad_RD = torch.zeros_like(blocks.hidden_RD, dtype=torch.float32)
        weight_grad = _gradient(ctx.weight) if needs_weight else None
        bias_grad = _gradient(ctx.bias) if needs_bias else None
        with torch.no_grad(), torch.autocast(blocks.hidden_RD.device.type, enabled=False):
            at_ids_R = blocks.only_at_ids(grad_RN) & (outside_grad_R == 0.0)
            for rows_R, is_sparse in ((~at_ids_R, False), (at_ids_R, True)):
                if not rows_R.any():
                    continue
                part = blocks if rows_R.all() else blocks.of(rows_R)
                found_rD = torch.zeros_like(part.hidden_RD, dtype=torch.float32)
                gradients_of = (found_rD if needs_hidden else None, weight_grad, bias_grad)
                if is_sparse:
                    part.sparse_pass(grad_RN[rows_R], *gradients_of)
                else:
                    outside = outside_grad_R[rows_R], outside_lse_R[rows_R]
                    part.second_pass(grad_RN[rows_R], lse_R[rows_R], *outside, *gradients_of)
                hidden_grad_RD[rows_R] = found_rD
        grad = hidden_grad_RD.to(blocks.hidden_RD.dtype) if needs_hidden else None
        return grad, None, None, None, None, None, None, None


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
