"""Losses of on-policy distillation.

`divergences` and `policy_gradients` say what a token costs, `weights` how much it counts, as
functions of tensors; `supports` says over which candidates; the `*_choice` modules hold one
callable a method, with its constants; `objective` joins them. No
settings, no records, no models. The trainer needs the names below.
"""

from .divergence_choice import (
    Divergence,
    EntropyAwareKL,
    ForwardKL,
    GeneralizedJSD,
    LocalSupportMatching,
    SampledReverseKL,
    StudentTopKReverseKL,
    TruncatedReverseKL,
)
from .inputs import LossInputs
from .objective import (
    StepSums,
    merge,
    needs_normalization,
    objective,
    step_scale,
    sum_over_processes,
)
from .weight_choice import (
    BlockGate,
    EntropyTop,
    ImportanceRatio,
    PositionWeight,
    PositionWindow,
    PrefixImportanceWeight,
    PruneWeight,
)

__all__ = [
    "BlockGate",
    "Divergence",
    "EntropyAwareKL",
    "EntropyTop",
    "ForwardKL",
    "GeneralizedJSD",
    "ImportanceRatio",
    "LocalSupportMatching",
    "LossInputs",
    "PositionWeight",
    "PositionWindow",
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
    "sum_over_processes",
]
