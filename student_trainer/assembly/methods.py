"""Settings of the methods to objects: the length budget, the divergence, the position weights."""

from __future__ import annotations

from student_trainer.assembly.own_loss import imported_loss
from student_trainer.losses import (
    LOSSES,
    BlockGate,
    Divergence,
    EntropyTop,
    ImportanceRatio,
    PositionWeight,
    PositionWindow,
    PrefixImportanceWeight,
    PruneWeight,
)
from student_trainer.rollouts.budget import (
    FixedBudget,
    LengthBudget,
    ProgressiveBudget,
    PruneBudget,
    QuantileBudget,
)
from student_trainer.settings.budget import (
    ProgressiveBudgetSettings,
    PruneBudgetSettings,
    QuantileBudgetSettings,
)
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.loss import ImportedLossSettings


def budget(config: TrainerConfig) -> LengthBudget:
    """How long the rollouts of a step may be."""
    settings = config.budget
    if isinstance(settings, PruneBudgetSettings):
        return PruneBudget(
            initial=settings.initial,
            minimum=settings.minimum,
            maximum=settings.maximum,
            step=settings.increment,
            margin=settings.margin,
            hit_share=settings.hit_ratio,
            patience=settings.patience,
            boundary=settings.boundary,
        )
    if isinstance(settings, ProgressiveBudgetSettings):
        return ProgressiveBudget(
            initial=settings.initial,
            maximum=settings.maximum,
            increment=settings.increment,
            every=settings.every_steps,
        )
    if isinstance(settings, QuantileBudgetSettings):
        return QuantileBudget(
            initial=settings.initial,
            minimum=settings.minimum,
            maximum=settings.maximum,
            margin=settings.margin,
            quantile=settings.quantile,
            rate=settings.rate,
        )
    return FixedBudget(settings.max_tokens)


def divergence(config: TrainerConfig) -> Divergence:
    """The loss of one position. Raises LossError for one of your own that cannot be taken."""
    if isinstance(config.loss, ImportedLossSettings):
        return imported_loss(config.loss.path, config.loss.options)
    return LOSSES[config.loss.kind](**config.loss.model_dump(exclude_unset=True))


def weights(config: TrainerConfig, *, newline_ids: tuple[int, ...] = ()) -> list[PositionWeight]:
    """The position weights that are on; `newline_ids` for a gate on the spans between newlines."""
    chosen: list[PositionWeight] = []
    settings = config.weights
    if (prune := settings.prune) is not None:
        given = prune.model_dump(exclude_unset=True)
        chosen.append(PruneWeight(w_drop=config.drift.w_drop, **given))
    if (prefix := settings.prefix_importance) is not None:
        chosen.append(PrefixImportanceWeight(**prefix.model_dump(exclude_unset=True)))
    if (window := settings.position_window) is not None:
        chosen.append(PositionWindow(**window.model_dump(exclude_unset=True)))
    if (top := settings.entropy_top) is not None:
        chosen.append(EntropyTop(**top.model_dump(exclude_unset=True)))
    if (gate := settings.block_gate) is not None:
        given = gate.model_dump(exclude_unset=True)
        chosen.append(BlockGate(newline_ids=newline_ids, **given))
    if (ratio := settings.importance_ratio) is not None:
        chosen.append(ImportanceRatio(**ratio.model_dump(exclude_unset=True)))
    return chosen
