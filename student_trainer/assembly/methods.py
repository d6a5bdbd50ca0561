"""Settings of the methods to objects: the length budget, the divergence, the position weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from student_trainer.assembly.own_loss import imported_loss
from student_trainer.losses import divergences, entropy_aware, policy_gradients
from student_trainer.losses.objective import Divergence
from student_trainer.losses.weight_choice import WEIGHTS, PositionWeight
from student_trainer.rollouts.budget import (
    FixedBudget,
    LengthBudget,
    ProgressiveBudget,
    PruneBudget,
    QuantileBudget,
)
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.loss import ImportedLossSettings

BUDGETS: dict[str, Callable[[Any], LengthBudget]] = {
    "fixed": FixedBudget,
    "prune": PruneBudget,
    "progressive": ProgressiveBudget,
    "quantile": QuantileBudget,
}
"""By kind of [budget]; each is made from its settings."""
LOSSES = {
    kind.model_fields["kind"].default: kind
    for kind in (*divergences.KINDS, *entropy_aware.KINDS, *policy_gradients.KINDS)
}
"""By kind of [loss]; each is made from its constants."""


def budget(config: TrainerConfig) -> LengthBudget:
    """How long the rollouts of a step may be."""
    return BUDGETS[config.budget.kind](config.budget)


def divergence(config: TrainerConfig) -> Divergence:
    """The loss of one position. Raises LossError for one of your own that cannot be taken."""
    if isinstance(config.loss, ImportedLossSettings):
        return imported_loss(config.loss.path, config.loss.options)
    return LOSSES[config.loss.kind](**config.loss.model_dump(exclude_unset=True))


def weights(config: TrainerConfig, *, newline_ids: tuple[int, ...] = ()) -> list[PositionWeight]:
    """The position weights that are on; `newline_ids` for a gate on the spans between newlines."""
    of_the_run: dict[str, dict[str, Any]] = {
        "prune": {"w_drop": config.w_drop_of(None)},
        "block_gate": {"newline_ids": newline_ids},
    }
    return [
        WEIGHTS[name](**settings.model_dump(exclude_unset=True), **of_the_run.get(name, {}))
        for name, settings in config.weights
        if settings is not None
    ]
