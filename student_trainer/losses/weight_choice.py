"""Which position weights a run uses: formula and its constants, as callables of the loss inputs.

Constants, defaults and ranges are stated in `settings.weights`, from which each class derives.

Shape legend: B = sequences, T = response positions.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, Self

from pydantic import model_validator
from torch import Tensor

from student_trainer.settings import weights as constants

from .gates import importance_ratios, span_gates
from .inputs import LossInputs, need
from .prefix_weights import (
    annealed_share,
    causal_weights,
    fixed_prefix_weights,
    ideal_blend_weights,
    ideal_ratio_weights,
    linear_weights,
    prefix_importance_weights,
    sampled_advantages,
    signed_importance_weights,
    surrogate_only_weights,
)
from .spans import block_spans, newline_spans
from .weights import entropy_top_weights, position_window, prune_weights, sample_mean_normalize


class PositionWeight(Protocol):
    """[B, T], detached, 0.0 where masked."""

    @property
    def mean_normalized(self) -> bool:
        """Whether, used alone, it is divided by its mean over the valid tokens of the step."""

    def __call__(self, inputs: LossInputs) -> Tensor: ...


class PruneWeight(constants.PruneWeightSettings):
    """Prune-OPD's reliability plus a floor: `weights.prune_weights`; `normalize` is ours."""

    w_drop: float
    """Reliability lost a bad event: the drift policy's."""

    @property
    def mean_normalized(self) -> bool:
        return self.normalize

    def __call__(self, inputs: LossInputs) -> Tensor:
        bad_events_BT = need(inputs.bad_events_BT, "bad_events_BT")
        return prune_weights(bad_events_BT, inputs.mask_BT, w_drop=self.w_drop, w_base=self.w_base)


class PrefixImportanceWeight(constants.PrefixImportanceSettings):
    """IW-OPD's share of the advantage still to come, or a row of its ablation: `prefix_weights`.

    The literal ratio is a weight only after division by its mean, so for it "none" is the mean of
    the step.
    """

    @property
    def mean_normalized(self) -> bool:
        return self.normalize == "batch_mean" or (
            self.kind == "ideal_ratio" and self.normalize == "none"
        )

    def __call__(self, inputs: LossInputs) -> Tensor:
        weight_BT = self._raw(inputs).to(inputs.teacher_logprobs_BT.dtype)
        if self.normalize == "sample_mean":
            return sample_mean_normalize(weight_BT, inputs.mask_BT)
        return weight_BT

    def _raw(self, inputs: LossInputs) -> Tensor:
        mask_BT, gamma = inputs.mask_BT, self.gamma
        if self.kind == "linear":
            return linear_weights(mask_BT, gamma=gamma)
        if self.kind == "fixed_prefix":
            return fixed_prefix_weights(mask_BT, gamma=gamma, prefix_share=self.prefix_share)
        if self.kind == "annealed_prefix":
            share = annealed_share(self.prefix_share, inputs.progress)
            return fixed_prefix_weights(mask_BT, gamma=gamma, prefix_share=share)
        advantage_BT = sampled_advantages(
            inputs.teacher_logprobs_BT,
            inputs.behavior_logprobs_BT,
            mask_BT,
            max_gap_nats=self.max_gap_nats,
        )
        if self.kind == "signed":
            return signed_importance_weights(advantage_BT, mask_BT, gamma=gamma)
        if self.kind == "surrogate_only":
            return surrogate_only_weights(advantage_BT, mask_BT)
        if self.kind == "ideal_ratio":
            return ideal_ratio_weights(advantage_BT, mask_BT, alpha=self.alpha)
        if self.kind == "ideal_blend":
            return ideal_blend_weights(advantage_BT, mask_BT, alpha=self.alpha, gamma=gamma)
        if self.kind == "causal":
            assert self.tau_nats is not None  # the settings refuse causal without it
            return causal_weights(advantage_BT, mask_BT, gamma=gamma, tau_nats=self.tau_nats)
        return prefix_importance_weights(advantage_BT, mask_BT, gamma=gamma)


class PositionWindow(constants.PositionWindowSettings):
    """Only the tokens between two shares of the response: `weights.position_window`."""

    mean_normalized: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        return position_window(
            inputs.mask_BT, start_share=self.start_share, end_share=self.end_share
        )


class EntropyTop(constants.EntropyTopSettings):
    """Only the tokens where the student is least sure: `weights.entropy_top_weights`."""

    mean_normalized: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        entropies_BT = need(inputs.student_entropies_BT, "student_entropies_BT")
        return entropy_top_weights(entropies_BT, inputs.mask_BT, ratio=self.ratio)


class BlockGate(constants.BlockGateSettings):
    """BPDG's gate on the student's own drift since the rollout: `gates.span_gates`.

    What is gated at once: a block (as published), a token, the whole sequence, or a span between
    newlines (`spans.newline_spans`), which alone reads the last three constants.
    """

    mean_normalized: ClassVar[bool] = True
    newline_ids: tuple[int, ...] = ()
    """The newline_tokens as ids."""

    @model_validator(mode="after")
    def _newlines_are_known(self) -> Self:
        if self.granularity == "newline" and not self.newline_ids:
            raise ValueError("granularity newline needs newline_ids, got none")
        return self

    def __call__(self, inputs: LossInputs) -> Tensor:
        logprobs = (inputs.student_logprobs_BT, inputs.behavior_logprobs_BT, inputs.mask_BT)
        return span_gates(*logprobs, self._spans(inputs), tau=self.tau, aggregate=self.aggregate)

    def _spans(self, inputs: LossInputs) -> Tensor:
        mask_BT = inputs.mask_BT
        if self.granularity == "newline":
            return newline_spans(
                need(inputs.response_ids_BT, "response_ids_BT"),
                mask_BT,
                newline_ids=self.newline_ids,
                min_span=self.min_span,
                max_span=self.max_span,
                block_size=self.block_size,
            )
        sizes = {"block": self.block_size, "token": 1, "sequence": max(1, mask_BT.shape[1])}
        return block_spans(mask_BT, block_size=sizes[self.granularity])


class ImportanceRatio(constants.ImportanceRatioSettings):
    """The bounded policy ratio, for losses that have none: `gates.importance_ratios`."""

    mean_normalized: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        return importance_ratios(
            inputs.student_logprobs_BT,
            inputs.behavior_logprobs_BT,
            inputs.mask_BT,
            mode=self.mode,
            granularity=self.granularity,
            min_ratio=self.min_ratio,
            max_ratio=self.max_ratio,
        )


WEIGHTS = {
    "prune": PruneWeight,
    "prefix_importance": PrefixImportanceWeight,
    "position_window": PositionWindow,
    "entropy_top": EntropyTop,
    "block_gate": BlockGate,
    "importance_ratio": ImportanceRatio,
}
"""By table of [weights], in whose order they are multiplied."""
