"""Settings of the position weights. Each is off unless its table is present.

Defaults are the papers'. What a weight means is in docs/methods.md.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from student_trainer.settings.section import Section


class PruneWeightSettings(Section):
    """Prune-OPD's L = R + w_base; R from the drift policy's w_drop."""

    w_base: float = Field(0.5, ge=0)
    normalize: bool = False
    """Divide by the mean over the step's tokens, so that the learning rate stays what it is."""


_READ_BY_KIND: dict[str, frozenset[str]] = {
    "cumulative": frozenset({"gamma", "max_gap_nats"}),
    "signed": frozenset({"gamma", "max_gap_nats"}),
    "linear": frozenset({"gamma"}),
    "fixed_prefix": frozenset({"gamma", "prefix_share"}),
    "surrogate_only": frozenset({"max_gap_nats"}),
    "ideal_ratio": frozenset({"alpha", "max_gap_nats"}),
    "ideal_blend": frozenset({"gamma", "alpha", "max_gap_nats"}),
    "causal": frozenset({"gamma", "tau_nats", "max_gap_nats"}),
}


class PrefixImportanceSettings(Section):
    """IW-OPD's unsigned cumulative share, or a row of its ablation."""

    kind: Literal[
        "cumulative",
        "signed",
        "linear",
        "fixed_prefix",
        "surrogate_only",
        "ideal_ratio",
        "ideal_blend",
        "causal",
    ] = "cumulative"
    gamma: float = Field(0.5, ge=0)
    """How much more than 1 the first token counts."""
    prefix_share: float = Field(0.3, gt=0, le=1)
    """Share of the response that fixed_prefix amplifies."""
    alpha: float = Field(0.01, gt=0, le=1)
    """Exponent of the prefix ratio in ideal_ratio and ideal_blend."""
    tau_nats: float | None = Field(None, gt=0)
    """Scale of causal; the logged abs_advantage_per_response says what a response amounts to."""
    max_gap_nats: float | None = Field(None, gt=0)
    """Bound of one token's |A| inside the sums; 5 is a sensible one, the paper has none."""
    normalize: Literal["none", "sample_mean", "batch_mean"] = "none"
    """Divide by the mean over the response or over the step's tokens."""

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> Self:
        unread = self.model_fields_set - _READ_BY_KIND[self.kind] - {"kind", "normalize"}
        if unread:
            raise ValueError(f"kind {self.kind} does not read {', '.join(sorted(unread))}")
        if self.kind == "causal" and self.tau_nats is None:
            raise ValueError(
                "kind causal needs tau_nats: the median of the summed |A| of a response, near the "
                "logged abs_advantage_per_response"
            )
        return self


class PositionWindowSettings(Section):
    """Only the tokens from one share of the response to another: the hard masks of IW-OPD."""

    start_share: float = Field(0.0, ge=0, lt=1)
    end_share: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.start_share >= self.end_share:
            raise ValueError(
                f"start_share is {self.start_share} and must be below the end_share "
                f"{self.end_share}"
            )
        return self


class EntropyTopSettings(Section):
    """Only each response's tokens of highest student entropy (recipe of the LSM code)."""

    ratio: float = Field(0.2, gt=0, le=1)
    """Share of the tokens, rounded up."""


class BlockGateSettings(Section):
    """Blockwise policy-drift gating."""

    granularity: Literal["block", "token", "sequence", "newline"] = "block"
    block_size: int = Field(64, gt=0)
    """Tokens in a block; for newline, in a response without one."""
    tau: float = Field(1.0, gt=0)
    aggregate: Literal["signed_mean", "mean_abs", "rms"] = "signed_mean"
    newline_tokens: tuple[str, ...] | None = Field(None, min_length=1)
    """Tokens that end a span; None: all whose text contains a newline."""
    min_span: int = Field(16, gt=0)
    """Tokens below which a span is joined to its neighbour."""
    max_span: int = Field(128, gt=0)
    """Tokens above which a span is cut."""

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
        unread = self.model_fields_set & {"newline_tokens", "min_span", "max_span"}
        if unread and self.granularity != "newline":
            raise ValueError(f"granularity {self.granularity} does not read {sorted(unread)[0]}")
        if 2 * self.min_span > self.max_span:
            raise ValueError(
                f"max_span is {self.max_span} and must be at least twice the min_span "
                f"{self.min_span}, so that a span that is cut does not fall below it"
            )
        return self


class ImportanceRatioSettings(Section):
    """p_student / p_behavior of the sampled token, for stale rollouts."""

    mode: Literal["truncate", "mask"] = "truncate"
    """Above max_ratio: count max_ratio; or, as below min_ratio, not at all."""
    granularity: Literal["token", "sequence"] = "token"
    """sequence: the geometric mean over the response."""
    min_ratio: float = Field(0.2, ge=0, le=1)
    max_ratio: float = Field(5.0, ge=1)

    @model_validator(mode="after")
    def _bounds_are_read(self) -> Self:
        if self.mode == "truncate" and "min_ratio" in self.model_fields_set:
            raise ValueError("mode truncate does not read min_ratio")
        return self


class WeightSettings(Section):
    """Position weights; each is off unless its table is present."""

    prune: PruneWeightSettings | None = None
    prefix_importance: PrefixImportanceSettings | None = None
    position_window: PositionWindowSettings | None = None
    entropy_top: EntropyTopSettings | None = None
    block_gate: BlockGateSettings | None = None
    importance_ratio: ImportanceRatioSettings | None = None
