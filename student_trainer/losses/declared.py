"""What a loss of your own says about itself: its kind, and what it needs of the run.

    from student_trainer.losses import LossInputs, Needs, loss

    @loss(kind="divergence", needs=Needs(teacher_k=2))
    def mine(inputs: LossInputs, *, share: float = 0.5) -> Tensor: ...

A divergence is never negative, and 0 where student and teacher agree. Of a surrogate only the
gradient means anything. What the others must obey is in `laws`; the whole is in docs/own-loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from student_trainer.settings.loss import Needs

LossKind = Literal["divergence", "surrogate"]


@dataclass(frozen=True, kw_only=True)
class DeclaredLoss:
    """A function of the loss inputs and its options, and what it declares; called like it."""

    function: Callable[..., Tensor]
    """function(inputs, **options): [B, T], with gradient, 0.0 where masked."""
    kind: LossKind
    needs: Needs

    def __call__(self, *args: object, **options: object) -> Tensor:
        return self.function(*args, **options)


def loss(
    *, kind: LossKind, needs: Needs | None = None
) -> Callable[[Callable[..., Tensor]], DeclaredLoss]:
    """Decorates a loss of your own; what `needs` does not name is not there in its inputs."""
    if kind not in get_args(LossKind):
        raise ValueError(f"kind must be divergence or surrogate, got {kind!r}")

    def declare(function: Callable[..., Tensor]) -> DeclaredLoss:
        return DeclaredLoss(function=function, kind=kind, needs=needs or Needs())

    return declare
