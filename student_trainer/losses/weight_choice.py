"""Which position weights a run uses: formula and its constants, as callables of the loss inputs.

Shape legend: B = sequences, T = response positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from .inputs import LossInputs, need
from .weights import (
    Aggregate,
    block_gates,
    check_block_gate,
    check_fraction,
    check_non_negative,
    prefix_importance_weights,
    prune_weights,
    reliability,
)


class PositionWeight(Protocol):
    """[B, T], detached, 0.0 where masked; `mean_normalized` if its paper divides it by its mean."""

    mean_normalized: ClassVar[bool]

    def __call__(self, inputs: LossInputs) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PruneWeight:
    """Prune-OPD's reliability plus a floor: `weights.prune_weights`."""

    mean_normalized: ClassVar[bool] = False
    w_drop: float = 0.01
    w_base: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("w_drop", self.w_drop)
        check_non_negative("w_base", self.w_base)

    def __call__(self, inputs: LossInputs) -> Tensor:
        bad_events_BT = need(inputs.bad_events_BT, "bad_events_BT")
        return prune_weights(bad_events_BT, inputs.mask_BT, w_drop=self.w_drop, w_base=self.w_base)

    def unreliable(self, inputs: LossInputs) -> Tensor:
        """bool [B, T]: valid tokens whose reliability has reached zero."""
        bad_events_BT = need(inputs.bad_events_BT, "bad_events_BT")
        reliability_BT = reliability(bad_events_BT, inputs.mask_BT, w_drop=self.w_drop)
        return (reliability_BT == 0.0) & inputs.mask_BT


@dataclass(frozen=True, kw_only=True)
class PrefixImportanceWeight:
    """IW-OPD's share of the advantage still to come: `weights.prefix_importance_weights`."""

    mean_normalized: ClassVar[bool] = False
    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_non_negative("gamma", self.gamma)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return prefix_importance_weights(
            inputs.teacher_logprobs_BT,
            inputs.behavior_logprobs_BT,
            inputs.mask_BT,
            gamma=self.gamma,
        )


@dataclass(frozen=True, kw_only=True)
class BlockGate:
    """BPDG's gate on the student's own drift since the rollout: `weights.block_gates`."""

    mean_normalized: ClassVar[bool] = True
    block_size: int = 64
    tau: float = 1.0
    aggregate: Aggregate = "signed_mean"

    def __post_init__(self) -> None:
        check_block_gate(self.block_size, self.tau, self.aggregate)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return block_gates(
            inputs.student_logprobs_BT,
            inputs.behavior_logprobs_BT,
            inputs.mask_BT,
            block_size=self.block_size,
            tau=self.tau,
            aggregate=self.aggregate,
        )
