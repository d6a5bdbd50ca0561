"""Settings of the position weights. Each is off unless its table is present.

Defaults are the papers'. What a weight means is in docs/methods.md.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from student_trainer.settings.section import ReadBy, Section


class PruneWeightSettings(Section):
    """Prune-OPD's L = R + w_base; R from the drift policy's w_drop."""

    w_base: float = Field(0.5, ge=0)
    """Weight of a token past a reliability of 0; one of full reliability has 1 more."""
    normalize: bool = False
    """Divide by the mean over the step's tokens, so that the learning rate stays what it is."""


class PrefixImportanceSettings(Section):
    """IW-OPD's unsigned cumulative share, or a row of its ablation."""

    kind: Literal[
        "cumulative",
        "signed",
        "linear",
        "fixed_prefix",
        "annealed_prefix",
        "surrogate_only",
        "ideal_ratio",
        "ideal_blend",
        "causal",
    ] = "cumulative"
    """The weight's form: docs/methods.md."""
    gamma: Annotated[
        float,
        ReadBy(
            "kind",
            "cumulative",
            "signed",
            "linear",
            "fixed_prefix",
            "annealed_prefix",
            "ideal_blend",
            "causal",
        ),
    ] = Field(0.5, ge=0)
    """How much more than 1 the first token counts."""
    prefix_share: Annotated[float, ReadBy("kind", "fixed_prefix", "annealed_prefix")] = Field(
        0.3, gt=0, le=1
    )
    """Share of the response, from its start, that is amplified; annealed: in the first step, from
    which it grows to all of it in the last, along half a cosine."""
    alpha: Annotated[float, ReadBy("kind", "ideal_ratio", "ideal_blend")] = Field(0.01, gt=0, le=1)
    """Exponent of the prefix ratio."""
    tau_nats: Annotated[float | None, ReadBy("kind", "causal")] = Field(None, gt=0)
    """Scale, nats, needed by causal; the logged abs_advantage_per_response says what a response
    amounts to."""
    max_gap_nats: Annotated[
        float | None,
        ReadBy(
            "kind",
            "cumulative",
            "signed",
            "surrogate_only",
            "ideal_ratio",
            "ideal_blend",
            "causal",
        ),
    ] = Field(None, gt=0)
    """Bound of one token's |A| inside the sums, nats; none: unbounded, as in the paper. 5 is a
    sensible one."""
    normalize: Literal["none", "sample_mean", "batch_mean"] = "none"
    """Divide by the mean over the response or over the step's tokens."""

    @model_validator(mode="after")
    def _causal_has_its_scale(self) -> Self:
        if self.kind == "causal" and self.tau_nats is None:
            raise ValueError(
                "kind causal needs tau_nats: the median of the summed |A| of a response, near the "
                "logged abs_advantage_per_response"
            )
        return self


class PositionWindowSettings(Section):
    """Only the tokens from one share of the response to another: the hard masks of IW-OPD."""

    start_share: float = Field(0.0, ge=0, lt=1)
    """Share of the kept response at which the window begins."""
    end_share: float = Field(1.0, gt=0, le=1)
    """Share at which it ends; above start_share."""

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
    """Share of a response's tokens that count, rounded down, at least one; of equal entropies
    all."""


class BlockGateSettings(Section):
    """Blockwise policy-drift gating."""

    granularity: Literal["block", "token", "sequence", "newline"] = "block"
    """What is gated as one; newline: the spans between newlines."""
    block_size: Annotated[int, ReadBy("granularity", "block", "newline")] = Field(64, gt=0)
    """Tokens in a block; for newline, in a response without one."""
    tau: float = Field(1.0, gt=0)
    """A block that has drifted by s nats counts exp(-tau |s|)."""
    aggregate: Literal["signed_mean", "mean_abs", "rms"] = "signed_mean"
    """The drift of a block from the log-ratios, student to behavior, of its tokens."""
    newline_tokens: Annotated[tuple[str, ...] | None, ReadBy("granularity", "newline")] = Field(
        None, min_length=1
    )
    """Tokens that end a span; none: all whose text contains a newline."""
    min_span: Annotated[int, ReadBy("granularity", "newline")] = Field(16, gt=0)
    """Tokens below which a span is joined to its neighbour."""
    max_span: Annotated[int, ReadBy("granularity", "newline")] = Field(128, gt=0)
    """Tokens above which a span is cut."""

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
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
    granularity: Literal["token", "sequence", "geometric"] = "token"
    """Whose ratio: the token's, the response's (the product of its tokens'), or their geometric
    mean."""
    min_ratio: Annotated[float, ReadBy("mode", "mask")] = Field(0.2, ge=0, le=1)
    """Ratio below which a token does not count."""
    max_ratio: float = Field(5.0, ge=1)
    """Ratio above which a token counts that much, or not at all."""


class WeightSettings(Section):
    """Position weights; each is off unless its table is present."""

    prune: PruneWeightSettings | None = None
    """By reliability: less, the more bad events came before."""
    prefix_importance: PrefixImportanceSettings | None = None
    """More for the tokens on which more of the response depends."""
    position_window: PositionWindowSettings | None = None
    """None outside a window of the response."""
    entropy_top: EntropyTopSettings | None = None
    """None where the student is sure."""
    block_gate: BlockGateSettings | None = None
    """Less where the student has moved away from the behavior policy."""
    importance_ratio: ImportanceRatioSettings | None = None
    """Corrects for rollouts of an older student."""
