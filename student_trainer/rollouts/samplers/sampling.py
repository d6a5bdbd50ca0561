"""The distribution that the samplers over transformers draw from, and one draw from it.

One uniform number a token is all the chance there is: a row's tokens are a function of its
log-probs and of its own numbers, whoever else is drawn for at the same time.

Legend: V = vocabulary, J = student top-k; `...` is nothing or rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.errors import SamplerError
from student_trainer.records import SamplingOptions
from teacher_wire.id_ranges import fill


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token a row."""

    token_ids: Tensor
    """[...]"""
    logprobs: Tensor
    """[...] under the distribution that was drawn from."""
    topk_ids: Tensor
    """[..., J] most likely first."""
    topk_logprobs: Tensor
    """[..., J]"""

    def cpu(self) -> Drawn:
        """The same, where numpy can read it."""
        return Drawn(
            self.token_ids.cpu(),
            self.logprobs.cpu(),
            self.topk_ids.cpu(),
            self.topk_logprobs.cpu(),
        )


class Uniforms:
    """The numbers in [0, 1) of one request, float64, by its seed.

    However many are taken at once, the n-th is the same.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator().manual_seed(seed or 0)

    def take(self, count: int) -> Tensor:
        """[count] the next ones."""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)


def sampling_logprobs(logits: Tensor, options: SamplingOptions) -> Tensor:
    """[..., V] log-probs of the distribution that is sampled from: softmax(logits / temperature)
    over the ids that take part, cut to the top-p nucleus and renormalised when top_p < 1.

    A temperature of 0 is one of 1 whose likeliest id is taken.
    """
    if options.excluded_ids:
        logits = logits.clone()
        fill(logits, options.excluded_ids, -torch.inf)
    logprobs = torch.log_softmax(logits / (options.temperature or 1.0), dim=-1)
    if options.top_p < 1.0:
        ordered = logprobs.sort(dim=-1, descending=True)
        probs = ordered.values.exp()
        outside = probs.cumsum(-1) - probs >= options.top_p
        outside = torch.zeros_like(outside).scatter(-1, ordered.indices, outside)
        logprobs = torch.log_softmax(logprobs.masked_fill(outside, -torch.inf), dim=-1)
    return logprobs


def drawn(logits: Tensor, options: SamplingOptions, uniforms: Tensor) -> Drawn:
    """A token for each row of logits [..., V], by its number of `uniforms` [...].

    Raises SamplerError for logits that are no numbers.
    """
    logprobs = sampling_logprobs(logits, options)
    token_ids = (
        logprobs.argmax(-1) if options.temperature == 0.0 else _at_uniform(logprobs, uniforms)
    )
    own = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    if not own.isfinite().all():
        raise SamplerError("the student's log-probs are NaN or infinite")
    topk = logprobs.topk(options.num_topk, dim=-1)
    return Drawn(
        token_ids=token_ids,
        logprobs=own,
        topk_ids=topk.indices,
        topk_logprobs=topk.values,
    )


def _at_uniform(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """[...] the id in whose part of [0, 1), in the order of ids, the number lies."""
    ends = logprobs.exp().cumsum(-1, dtype=torch.float64)
    total = ends[..., -1:]
    # Below the end of the last id that can be drawn, whatever the product rounds to.
    place = torch.minimum(
        uniforms.to(ends.device).unsqueeze(-1) * total,
        torch.nextafter(total, torch.zeros_like(total)),
    )
    found = torch.searchsorted(ends, place, right=True).squeeze(-1)
    return found.clamp_max(logprobs.shape[-1] - 1)  # NaN is beyond all of them
