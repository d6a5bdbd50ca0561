"""Settings of the methods to objects: the length budget, the divergence, the position weights."""

from __future__ import annotations

from student_trainer.budget import (
    FixedBudget,
    LengthBudget,
    ProgressiveBudget,
    PruneBudget,
    QuantileBudget,
)
from student_trainer.config import TrainerConfig
from student_trainer.config_methods import (
    ForwardKLSettings,
    LocalSupportMatchingSettings,
    ProgressiveBudgetSettings,
    PruneBudgetSettings,
    QuantileBudgetSettings,
    SampledReverseKLSettings,
    TruncatedReverseKLSettings,
)
from student_trainer.losses import (
    BlockGate,
    Divergence,
    ForwardKL,
    LocalSupportMatching,
    PositionWeight,
    PrefixImportanceWeight,
    PruneWeight,
    SampledReverseKL,
    StudentTopKReverseKL,
    TruncatedReverseKL,
)


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
    """The loss of one position."""
    loss = config.loss
    if isinstance(loss, LocalSupportMatchingSettings):
        return LocalSupportMatching(clip_log_ratio=loss.clip_log_ratio)
    if isinstance(loss, TruncatedReverseKLSettings):
        return TruncatedReverseKL(tail=loss.tail)
    if isinstance(loss, ForwardKLSettings):
        return ForwardKL()
    kind = SampledReverseKL if isinstance(loss, SampledReverseKLSettings) else StudentTopKReverseKL
    return kind(clip_epsilon=loss.clip_epsilon, dual_clip=loss.dual_clip)


def weights(config: TrainerConfig) -> list[PositionWeight]:
    """The position weights that are on, in the order of methods: prune, prefix importance, gate."""
    chosen: list[PositionWeight] = []
    if (prune := config.weights.prune) is not None:
        chosen.append(PruneWeight(w_drop=config.drift.w_drop, w_base=prune.w_base))
    if (prefix := config.weights.prefix_importance) is not None:
        chosen.append(PrefixImportanceWeight(gamma=prefix.gamma))
    if (gate := config.weights.block_gate) is not None:
        chosen.append(BlockGate(block_size=gate.block_size, tau=gate.tau, aggregate=gate.aggregate))
    return chosen
