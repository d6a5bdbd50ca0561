"""Settings of the length budget: how long the rollouts of a step may be."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from student_trainer.settings.section import Section


def _check_bounds(minimum: int, initial: int, maximum: int) -> None:
    if not minimum <= initial <= maximum:
        raise ValueError(
            f"budget needs minimum <= initial <= maximum, got {minimum}, {initial}, {maximum}"
        )


class FixedBudgetSettings(Section):
    kind: Literal["fixed"] = "fixed"
    max_tokens: int = Field(gt=0)


class PruneBudgetSettings(Section):
    """Prune-OPD's batch-level controller (section 3.3 of the paper)."""

    kind: Literal["prune"]
    initial: int = Field(2048, gt=0)
    minimum: int = Field(1024, gt=0)
    maximum: int = Field(12288, gt=0)
    increment: int = Field(100, gt=0)
    margin: int = Field(100, ge=0)
    hit_ratio: float = Field(0.1, gt=0, le=1)
    patience: int = Field(3, gt=0)
    boundary: Literal["paper", "code"] = "code"
    """They differ near the minimum: the released code never looks below it."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_bounds(self.minimum, self.initial, self.maximum)
        return self


class ProgressiveBudgetSettings(Section):
    """A horizon that grows by `increment` every `every_steps` steps (TOPD/POPD, 2605.31490)."""

    kind: Literal["progressive"]
    initial: int = Field(gt=0)
    maximum: int = Field(gt=0)
    increment: int = Field(ge=0)
    every_steps: int = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_bounds(1, self.initial, self.maximum)
        return self


class QuantileBudgetSettings(Section):
    """Moves towards a quantile of the effective lengths plus a margin (ours)."""

    kind: Literal["quantile"]
    initial: int = Field(gt=0)
    minimum: int = Field(gt=0)
    maximum: int = Field(gt=0)
    margin: int = Field(100, ge=0)
    quantile: float = Field(0.9, gt=0, le=1)
    rate: float = Field(0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_bounds(self.minimum, self.initial, self.maximum)
        return self
