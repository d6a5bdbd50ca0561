"""The [R, V] logits, block by block: what the two passes of `head_logprobs` do with each.

Legend: R = rows, D = hidden size, V = vocabulary, N = ids a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from student_trainer.learner.head import Head
from teacher_wire.id_ranges import fill, num_ids, within

BLOCK = {"cpu": (512, 1024), "other": (4096, 4096)}
"""Rows and ids of a block: 2 MiB of float32 logits, for a CPU's cache; 64 MiB for a GPU."""
LOWEST = -1e4
"""Nats below the maximum of what counts as nought: a logit of -inf has no entropy, and no NaN."""

LEFT_OUT = -1e30
"""A logit that takes no part in a sum which may have no other."""

BALANCED = 1e-6
"""Of the sum of a row's sizes, what its gradients add up to at most where they add up to nought:
float32's rounding of a hundred of them."""


class LogitBlocks:
    """The [R, V] logits, cut into blocks, and the ids asked for that fall into each."""

    def __init__(
        self,
        head: Head,
        hidden_RD: Tensor,
        ids_RN: Tensor,
        support_RN: Tensor | None,
        temperature: float,
        dtype: torch.dtype,
    ) -> None:
        self.hidden_RD, self._ids_RN, self._support_RN = hidden_RD, ids_RN, support_RN
        self._head, self._temperature, self._dtype = head, temperature, dtype
        kind = "cpu" if hidden_RD.device.type == "cpu" else "other"
        num_rows, width = BLOCK[kind]
        vocab_size, num_asked = len(head.weight_VD), ids_RN.shape[1]
        width = min(width, vocab_size)
        self._row_slices = _slices(len(hidden_RD), num_rows)
        self._vocab_slices = _slices(vocab_size, width)
        self._excluded = [
            within(head.excluded_ids, vocab.start, vocab.stop) for vocab in self._vocab_slices
        ]
        # Sorted by block, so that those of one are a slice of the list.
        flat = ids_RN.flatten()
        row = torch.arange(len(hidden_RD), device=flat.device).repeat_interleave(num_asked)
        block = (row // num_rows) * len(self._vocab_slices) + flat // width
        self._order = block.argsort()
        counts = block.bincount(minlength=len(self._row_slices) * len(self._vocab_slices))
        self._ends = counts.cumsum(0).tolist()
        self._offsets = ((row % num_rows) * width + flat % width)[self._order]
        self._shape = ids_RN.shape

    def of(self, rows_R: Tensor) -> LogitBlocks:
        """The same of some of the rows."""
        support_RN = None if self._support_RN is None else self._support_RN[rows_R]
        return LogitBlocks(
            self._head,
            self.hidden_RD[rows_R],
            self._ids_RN[rows_R],
            support_RN,
            self._temperature,
            self._dtype,
        )

    def only_at_ids(self, grad_RN: Tensor) -> Tensor:
        """bool [R]: whose logits have a gradient at the ids asked for and nowhere else.

        Rows without any; and, where products are float32 and logits not capped, those whose
        gradients add up to nought: what a loss gives that is renormalised on its ids.
        """
        sizes_R = grad_RN.abs().sum(1)
        is_plain = self._dtype == torch.float32 and self._head.transform.soft_cap is None
        return grad_RN.sum(1).abs() <= BALANCED * sizes_R if is_plain else sizes_R == 0

    def _asked(self, i: int, j: int, width: int) -> tuple[Tensor, Tensor]:
        """Places in the flat [R, N] of the ids in a block, and in the flat block itself."""
        number = i * len(self._vocab_slices) + j
        places = slice(self._ends[number - 1] if number else 0, self._ends[number])
        offsets, full = self._offsets[places], self._vocab_slices[0].stop
        if width != full:  # the last block is narrower
            offsets = offsets // full * width + offsets % full
        return self._order[places], offsets

    def _in_support(self, places: Tensor, offsets: Tensor) -> Tensor:
        """Of the places in a flat block those whose ids are in the support."""
        assert self._support_RN is not None
        return offsets[self._support_RN.flatten()[places]]

    def _logits(self, hidden_rD: Tensor, vocab: slice) -> Tensor:
        """float32 [rows, ids] of a block, transformed and at the temperature; nothing left out."""
        logits = _product(hidden_rD, rounded(self._head.weight_VD[vocab], self._dtype).T)
        if self._head.bias_V is not None:
            logits += self._head.bias_V[vocab]
        return self._head.transform.apply_(logits, self._temperature)

    def _each(self) -> Iterator[tuple[int, slice, int, slice, Tensor]]:
        for i, rows in enumerate(self._row_slices):
            hidden_rD = rounded(self.hidden_RD[rows], self._dtype)
            for j, vocab in enumerate(self._vocab_slices):
                yield i, rows, j, vocab, hidden_rD

    def first_pass(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs [R, N], log-sum-exp [R] of all ids and of those outside the support (-inf
        where there is none), and entropies [R]."""
        new = self.hidden_RD.new_zeros
        picked_RN = new(self._shape, dtype=torch.float32)
        total_R = new(len(self.hidden_RD), dtype=torch.float32)
        peak_R, moment_R = torch.full_like(total_R, -torch.inf), torch.zeros_like(total_R)
        outside = torch.full_like(total_R, LEFT_OUT), torch.zeros_like(total_R)
        for i, rows, j, vocab, hidden_rD in self._each():
            logits = self._logits(hidden_rD, vocab)
            # After the transform: a soft-cap would make -inf a number.
            fill(logits, self._excluded[j], -torch.inf)
            places, offsets = self._asked(i, j, logits.shape[1])
            picked_RN.view(-1)[places] = logits.view(-1)[offsets]
            if num_ids(self._excluded[j]) == logits.shape[1]:
                continue  # it has no peak
            if self._support_RN is not None:
                inside = self._in_support(places, offsets)
                _add_outside_(outside[0][rows], outside[1][rows], logits, inside)
            may_be_nought = self._head.bias_V is not None or bool(self._excluded[j])
            sums_r = peak_R[rows], total_R[rows], moment_R[rows]
            _add_block_(*sums_r, logits, may_be_nought=may_be_nought)
        log_total_R = total_R.log()
        lse_R = peak_R + log_total_R
        outside_lse_R = outside[0] + outside[1].log()  # of no id at all: -inf
        entropy_R = log_total_R - moment_R / total_R
        return picked_RN - lse_R.unsqueeze(1), lse_R, outside_lse_R, entropy_R

    def second_pass(
        self,
        grad_RN: Tensor,
        lse_R: Tensor,
        outside_grad_R: Tensor,
        outside_lse_R: Tensor,
        hidden_grad_RD: Tensor | None,
        weight_grad_VD: Tensor | None,
        bias_grad_V: Tensor | None,
    ) -> None:
        """Adds the gradients to those that are given: of logits, at the ids, -p everywhere, and
        outside the support the softmax of what is there."""
        sums_R1 = (grad_RN.sum(1) + outside_grad_R).unsqueeze(1)
        grad_flat, has_outside = grad_RN.reshape(-1), bool(outside_grad_R.any())
        capped = self._head.transform.soft_cap is not None
        for i, rows, j, vocab, hidden_rD in self._each():
            logits = self._logits(hidden_rD, vocab)
            places, offsets = self._asked(i, j, logits.shape[1])
            gradient = logits.clone() if capped or has_outside else logits
            gradient.sub_(lse_R[rows].unsqueeze(1)).exp_().mul_(-sums_R1[rows])
            gradient.view(-1).index_add_(0, offsets, grad_flat[places])
            if has_outside:
                outside = logits.clone() if capped else logits
                outside.sub_(outside_lse_R[rows].unsqueeze(1))
                outside.view(-1)[self._in_support(places, offsets)] = -torch.inf
                gradient.addcmul_(outside.exp_(), outside_grad_R[rows].unsqueeze(1))
            self._head.transform.add_slope_(gradient, logits, self._temperature)
            fill(gradient, self._excluded[j], 0.0)
            if bias_grad_V is not None:
                bias_grad_V[vocab] += gradient.sum(0)
            gradient = rounded(gradient, self._dtype, for_product=True)
            if hidden_grad_RD is not None:
                weight = rounded(self._head.weight_VD[vocab], self._dtype)
                _add_product(hidden_grad_RD[rows], gradient, weight)
            if weight_grad_VD is not None:
                _add_product(weight_grad_VD[vocab], gradient.T, hidden_rD)

    def sparse_pass(
        self,
        grad_RN: Tensor,
        hidden_grad_RD: Tensor | None,
        weight_grad_VD: Tensor | None,
        bias_grad_V: Tensor | None,
    ) -> None:
        """The same for rows of `only_at_ids`: no logit is made again."""
        if not grad_RN.any():
            return
        weight_VD, ids_RN = self._head.weight_VD, self._ids_RN
        grad_RN = grad_RN * (self._head.transform.scale / self._temperature)
        for start, end in self._head.excluded_ids:
            grad_RN = grad_RN.masked_fill((ids_RN >= start) & (ids_RN < end), 0.0)
        if bias_grad_V is not None:
            bias_grad_V.index_add_(0, ids_RN.flatten(), grad_RN.flatten())
        if hidden_grad_RD is not None:
            hidden_grad_RD += embedding_bag(
                ids_RN, weight_VD, per_sample_weights=grad_RN, mode="sum"
            )
        if weight_grad_VD is not None:
            rows = torch.arange(len(ids_RN), device=ids_RN.device).repeat_interleave(
                ids_RN.shape[1]
            )
            by_id = torch.sparse_coo_tensor(
                torch.stack([ids_RN.flatten(), rows]),
                grad_RN.flatten(),
                (len(weight_VD), len(ids_RN)),
                check_invariants=False,
            )
            weight_grad_VD.addmm_(by_id, self.hidden_RD)


def _add_block_(
    peak_r: Tensor, total_r: Tensor, moment_r: Tensor, logits: Tensor, *, may_be_nought: bool
) -> None:
    """Running softmax: sum of e = exp(logit - peak), and of e * (logit - peak).

    In place, the logits too. They are -inf only where `may_be_nought`, and not all of a row.
    """
    new_peak_r = torch.maximum(peak_r, logits.amax(1))
    shift_r = (peak_r - new_peak_r).clamp_(min=LOWEST)
    carried_r = total_r * shift_r.exp()
    moment_r.mul_(shift_r.exp()).add_(carried_r * shift_r)
    below = logits.sub_(new_peak_r.unsqueeze(1))
    if may_be_nought:
        below.clamp_(min=LOWEST)
    exps = below.exp()
    total_r.copy_(carried_r).add_(exps.sum(1))
    moment_r.add_(exps.mul_(below).sum(1))
    peak_r.copy_(new_peak_r)


def _add_outside_(peak_r: Tensor, total_r: Tensor, logits: Tensor, inside: Tensor) -> None:
    """Running softmax of a block less its places `inside`; the logits stay as they are."""
    logits = logits.clone()
    logits.view(-1)[inside] = -torch.inf
    new_peak_r = torch.maximum(peak_r, logits.amax(1))
    total_r.mul_((peak_r - new_peak_r).exp_())
    total_r.add_(logits.sub_(new_peak_r.unsqueeze(1)).exp_().sum(1))
    peak_r.copy_(new_peak_r)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def rounded(tensor: Tensor, dtype: torch.dtype, *, for_product: bool = False) -> Tensor:
    """As the operand of a product in `dtype` with a float32 sum.

    A CPU multiplies in float32 what was rounded to `dtype`: the same numbers, and far faster than
    its arithmetic of 16 bits, which few have. There a gradient need not be rounded at all.
    """
    if tensor.device.type != "cpu":
        return tensor.to(dtype)
    return tensor.float() if for_product else tensor.to(dtype).float()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """float32, whatever the operands."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += _product(left, right)
