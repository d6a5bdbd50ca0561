"""Losses of on-policy distillation.

`divergences` and `policy_gradients` say what a token costs, `weights` how much it counts, as
functions of tensors; `supports` says over which candidates. A class beside a formula adds its
constants, which are stated in `settings.loss` and `settings.weights`; `objective` joins them,
`laws` says what every loss must obey, `declared` what one of your own says about itself. No
configuration of a run, no records, no models. The names below are for losses of your own.
"""

from student_trainer.settings.loss import Needs

from .declared import DeclaredLoss, loss
from .inputs import Candidates, LossInputs

__all__ = ["Candidates", "DeclaredLoss", "LossInputs", "Needs", "loss"]
