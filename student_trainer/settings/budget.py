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
    """The same length every step."""

    kind: Literal["fixed"] = "fixed"
    """How the length moves."""
    max_tokens: int = Field(gt=0)
    """Response tokens that a rollout may have."""


class PruneBudgetSettings(Section):
    """Prune-OPD's batch-level controller (section 3.3 of the paper)."""

    kind: Literal["prune"] = "prune"
    initial: int = Field(2048, gt=0)
    """Response tokens that a rollout of the first step may have."""
    minimum: int = Field(1024, gt=0)
    """Tokens below which the length does not fall."""
    maximum: int = Field(12288, gt=0)
    """Tokens above which it does not grow."""
    increment: int = Field(100, gt=0)
    """Tokens by which it moves."""
    margin: int = Field(100, ge=0)
    """Tokens below the present length from which a rollout's effective length is a hit."""
    hit_ratio: float = Field(0.1, gt=0, le=1)
    """Share of a step's rollouts that must hit for the length to grow."""
    patience: int = Field(3, gt=0)
    """Steps in a row with fewer hits after which it shrinks."""
    boundary: Literal["paper", "code"] = "code"
    """They differ near the minimum: the released code never looks below it."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_bounds(self.minimum, self.initial, self.maximum)
        return self


class ProgressiveBudgetSettings(Section):
    """A horizon that grows by `increment` every `every_steps` steps (TOPD/POPD, 2605.31490)."""

    kind: Literal["progressive"] = "progressive"
    initial: int = Field(gt=0)
    """Response tokens that a rollout of the first step may have."""
    maximum: int = Field(gt=0)
    """Tokens above which the length does not grow."""
    increment: int = Field(ge=0)
    """Tokens by which it grows at a time."""
    every_steps: int = Field(gt=0)
    """Steps after which it grows."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_bounds(1, self.initial, self.maximum)
        return self


class QuantileBudgetSettings(Section):
    """Moves towards a quantile of the effective lengths plus a margin (ours)."""

    kind: Literal["quantile"] = "quantile"
    initial: int = Field(gt=0)
    """Response tokens that a rollout of the first step may have."""
    minimum: int = Field(gt=0)
    """Tokens below which the length does not fall."""
    maximum: int = Field(gt=0)
    """Tokens above which it does not grow."""
    margin: int = Field(100, ge=0)
    """Tokens beyond the quantile that it moves to."""
    quantile: float = Field(0.9, gt=0, le=1)
    """Share of the rollouts whose effective length is below the quantile."""
    rate: float = Field(0.5, gt=0, le=1)
    """Share of the way that it goes in a step."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_bounds(self.minimum, self.initial, self.maximum)
        return self
