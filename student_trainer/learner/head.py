"""The language-model head of a family: the linear map and what is done to its product."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from teacher_wire.id_ranges import IdRanges


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """What a family does to the head's product: cap * tanh(scale * product / cap)."""

    scale: float = 1.0
    soft_cap: float | None = None

    def apply_(self, logits: Tensor, temperature: float) -> Tensor:
        """In place, and divided by the temperature."""
        if self.soft_cap is None:
            return scaled_(logits, self.scale / temperature)
        logits.mul_(self.scale / self.soft_cap).tanh_()
        return logits.mul_(self.soft_cap / temperature)

    def add_slope_(self, gradient: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """The gradient of `logits`, which is what `apply_` made, becomes that of the product."""
        if self.soft_cap is not None:
            tanh = logits.mul_(temperature / self.soft_cap)
            gradient.addcmul_(gradient, tanh.square_(), value=-1)
        return scaled_(gradient, self.scale / temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A linear head and its transform. The weight is a leaf: its gradient is added in place."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    transform: LogitTransform = field(default_factory=LogitTransform)
    excluded_ids: IdRanges = ()
    """Ids that take no part: a log-prob of -inf, no gradient. Those beyond V are passed over."""


def scaled_(tensor: Tensor, factor: float) -> Tensor:
    """In place."""
    return tensor if factor == 1.0 else tensor.mul_(factor)
