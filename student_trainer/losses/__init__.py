"""Losses of on-policy distillation.

`divergences` and `policy_gradients` say what a token costs, `weights` how much it counts, as
functions of tensors; `supports` says over which candidates. A class beside a formula adds its
constants, which are stated in `settings.loss` and `settings.weights`; `objective` joins them,
`laws` says what every loss must obey, `declared` what one of your own says about itself. No
configuration of a run, no records, no models. The trainer needs the names below.
"""

from student_trainer.settings.loss import Needs

from . import divergences, policy_gradients
from .declared import DeclaredLoss, loss
from .divergences import (
    EntropyAwareKL,
    ForwardKL,
    GeneralizedJSD,
    LocalSupportMatching,
    TruncatedReverseKL,
)
from .inputs import Candidates, LossInputs
from .objective import (
    Divergence,
    StepSums,
    merge,
    needs_normalization,
    objective,
    step_scale,
    sum_over_processes,
)
from .policy_gradients import SampledReverseKL, StudentTopKReverseKL
from .weight_choice import (
    BlockGate,
    EntropyTop,
    ImportanceRatio,
    PositionWeight,
    PositionWindow,
    PrefixImportanceWeight,
    PruneWeight,
)

LOSSES = {
    constants.model_fields["kind"].default: constants
    for constants in (*divergences.KINDS, *policy_gradients.KINDS)
}
"""By kind of [loss]; each is made from its constants."""

__all__ = [
    "LOSSES",
    "BlockGate",
    "Candidates",
    "DeclaredLoss",
    "Divergence",
    "EntropyAwareKL",
    "EntropyTop",
    "ForwardKL",
    "GeneralizedJSD",
    "ImportanceRatio",
    "LocalSupportMatching",
    "LossInputs",
    "Needs",
    "PositionWeight",
    "PositionWindow",
    "PrefixImportanceWeight",
    "PruneWeight",
    "SampledReverseKL",
    "StepSums",
    "StudentTopKReverseKL",
    "TruncatedReverseKL",
    "loss",
    "merge",
    "needs_normalization",
    "objective",
    "step_scale",
    "sum_over_processes",
]
