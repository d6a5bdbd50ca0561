"""Losses of on-policy distillation.

`divergences` say what a token costs, `weights` how much it counts; `objective` joins them. Pure
functions of tensors: no settings, no records, no models. The trainer needs the names below; the
formulas as functions are in the modules.
"""

from .inputs import LossInputs
from .objective import (
    BlockGate,
    Divergence,
    ForwardKL,
    LocalSupportMatching,
    PositionWeight,
    PrefixImportanceWeight,
    PruneWeight,
    SampledReverseKL,
    StepSums,
    StudentTopKReverseKL,
    TruncatedReverseKL,
    merge,
    needs_normalization,
    objective,
    step_scale,
)

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
