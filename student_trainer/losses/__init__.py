"""Losses of on-policy distillation.

`divergences` say what a token costs, `weights` how much it counts, as functions of tensors; the
`*_choice` modules hold one callable a method, with its constants; `objective` joins them. No
settings, no records, no models. The trainer needs the names below.
"""

from .divergence_choice import (
    Divergence,
    ForwardKL,
    LocalSupportMatching,
    SampledReverseKL,
    StudentTopKReverseKL,
    TruncatedReverseKL,
)
from .inputs import LossInputs
from .objective import StepSums, merge, needs_normalization, objective, step_scale
from .weight_choice import BlockGate, PositionWeight, PrefixImportanceWeight, PruneWeight

__all__ = [
    "BlockGate",
    "Divergence",
    "ForwardKL",
    "LocalSupportMatching",
    "LossInputs",
    "PositionWeight",
    "PrefixImportanceWeight",
    "PruneWeight",
    "SampledReverseKL",
    "StepSums",
    "StudentTopKReverseKL",
    "TruncatedReverseKL",
    "merge",
    "needs_normalization",
    "objective",
    "step_scale",
]
