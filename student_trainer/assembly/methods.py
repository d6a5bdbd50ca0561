"""Settings of the methods to objects: the length budget, the divergence, the position weights."""

from __future__ import annotations

from collections.abc import Callable

from student_trainer.losses import (
    BlockGate,
    Divergence,
    EntropyAwareKL,
    EntropyTop,
    ForwardKL,
    GeneralizedJSD,
    ImportanceRatio,
    LocalSupportMatching,
    PositionWeight,
    PositionWindow,
    PrefixImportanceWeight,
    PruneWeight,
    SampledReverseKL,
    StudentTopKReverseKL,
    TruncatedReverseKL,
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


_DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "entropy_aware_kl": EntropyAwareKL,
    "forward_kl": ForwardKL,
    "generalized_jsd": GeneralizedJSD,
    "local_support_matching": LocalSupportMatching,
    "sampled_reverse_kl": SampledReverseKL,
    "student_topk_reverse_kl": StudentTopKReverseKL,
    "truncated_reverse_kl": TruncatedReverseKL,
}
"""By kind of [loss]; constants and settings have the same names."""


def divergence(config: TrainerConfig) -> Divergence:
    """The loss of one position."""
    return _DIVERGENCES[config.loss.kind](**config.loss.model_dump(exclude={"kind"}))


def weights(config: TrainerConfig, *, newline_ids: tuple[int, ...] = ()) -> list[PositionWeight]:
    """The position weights that are on; `newline_ids` for a gate on the spans between newlines."""
    chosen: list[PositionWeight] = []
    settings = config.weights
    if (prune := settings.prune) is not None:
        chosen.append(PruneWeight(w_drop=config.drift.w_drop, **prune.model_dump()))
    if (prefix := settings.prefix_importance) is not None:
        chosen.append(PrefixImportanceWeight(**prefix.model_dump()))
    if (window := settings.position_window) is not None:
        chosen.append(PositionWindow(**window.model_dump()))
    if (top := settings.entropy_top) is not None:
        chosen.append(EntropyTop(**top.model_dump()))
    if (gate := settings.block_gate) is not None:
        constants = gate.model_dump(exclude={"newline_tokens"})
        chosen.append(BlockGate(newline_ids=newline_ids, **constants))
    if (ratio := settings.importance_ratio) is not None:
        chosen.append(ImportanceRatio(**ratio.model_dump()))
    return chosen
