"""Losses without their formulas: the constants of each, with defaults and ranges, stated here only.

The formula of a section is the class that derives from it in losses/. Each section says what it
needs of the rest of the run; `TrainerConfig` checks that it is there. No torch. What a loss means
is in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, PrivateAttr, field_validator, model_validator

from student_trainer.settings.section import ReadBy, Section

MIN_SHARE = 0.001
"""Of a mixture: at 1e-6 float32 is wrong by 6 %, at 1e-12 nothing is learnt."""

ClipEpsilon = Annotated[float, Field(gt=0, lt=1)]
DualClip = Annotated[float, Field(gt=1)]


MatchingSupport = Literal["teacher_topk", "student_topk_and_sampled", "teacher_topk_and_sampled"]
"""V1, V2 and V3 of arXiv 2603.25562, appendix G.3."""
RewardSupport = Literal["only_stu", "only_tch", "intersection", "union", "symmetric_difference"]
"""The names of thunlp/OPD and Prune-OPD; its union-intersection is `symmetric_difference`."""
WeightMode = Literal["student_p", "teacher_p", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a loss needs of the run, besides what three policies think of the sampled token."""

    teacher_k: int = 0
    """Least size of the teacher's top-k (K); 0: it does not look at it."""
    student_topk: bool = False
    """The student's top-k as candidates."""
    teacher_columns: tuple[str, ...] = ()
    """Columns of the teacher's rows besides those that every row has, such as "entropies"."""
    behavior_at_teacher_topk: bool = False
    """The behavior policy's log-probs at ids that only the teacher named."""
    behavior_logprobs: bool = False
    """Behavior log-probs of the sampled token that may be compared with the student's."""
    mass_outside: MatchingSupport | None = None
    """The support for which the log of the student's mass outside is computed."""


def _outside_topk(tail: bool) -> MatchingSupport | None:
    return "teacher_topk" if tail else None


class LossSection(Section):
    """A loss: its constants, with their ranges, are the fields; the formula is in losses/."""

    kind: str

    @property
    def has_a_ratio(self) -> bool:
        """Whether the policy ratio is a part of it."""
        return False

    @property
    def needs(self) -> Needs:
        return Needs(teacher_k=1)

    @property
    def name(self) -> str:
        """What an error calls it."""
        return self.kind


class PolicyGradientSection(LossSection):
    """A loss whose surrogate is made of policy ratios."""

    @property
    def has_a_ratio(self) -> bool:
        return True


class SampledReverseKLSettings(PolicyGradientSection):
    """Policy gradient of the sampled token."""

    kind: Literal["sampled_reverse_kl"] = "sampled_reverse_kl"
    """What one position costs."""
    clip_epsilon: ClipEpsilon | None = 0.2
    """PPO clip of the ratio; none leaves it alone."""
    dual_clip: DualClip | None = 3.0
    """Bound of the ratio where the advantage is negative."""
    baseline: Literal["none", "student_topk"] = "none"
    """What is taken off the advantage: nothing, or its expectation over the student's top-k
    (vOPD), which leaves the expected gradient as it is and lowers its variance."""

    @property
    def needs(self) -> Needs:
        return Needs(behavior_logprobs=True, student_topk=self.baseline == "student_topk")


class LocalSupportMatchingSettings(LossSection):
    """Reverse KL on a support, renormalised there (Revisiting OPD)."""

    kind: Literal["local_support_matching"] = "local_support_matching"
    support: MatchingSupport = "teacher_topk"
    """Variants V1, V2 and V3 of the paper's G.3; a sampled token in the top-k counts once."""
    tail: bool = False
    """Everything outside the support as one more class, instead of renormalising."""
    clip_log_ratio: float | None = Field(None, gt=0)
    """Nats to which the log-ratio of each candidate is clamped."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.tail and self.clip_log_ratio is not None:
            raise ValueError(
                "tail and clip_log_ratio exclude each other: the clamp is of the renormalised "
                "form, and on a tail it would cut the gradient that brings mass into the support"
            )
        return self

    @property
    def needs(self) -> Needs:
        mass_outside = self.support if self.tail else None
        if self.support == "student_topk_and_sampled":
            return Needs(student_topk=True, mass_outside=mass_outside)
        teacher_k = 2 if self.support == "teacher_topk" and not self.tail else 1
        return Needs(teacher_k=teacher_k, mass_outside=mass_outside)


class TruncatedReverseKLSettings(LossSection):
    """Local support matching without renormalising: an ablation; with a tail, a divergence."""

    kind: Literal["truncated_reverse_kl"] = "truncated_reverse_kl"
    tail: bool
    """Everything outside the support as one more class."""

    @property
    def needs(self) -> Needs:
        return Needs(teacher_k=1, mass_outside=_outside_topk(self.tail))


class ForwardKLSettings(LossSection):
    """KL from the teacher over its top-k (GKD)."""

    kind: Literal["forward_kl"] = "forward_kl"
    tail: bool = True
    """Everything outside the support as one more class; without, the teacher is renormalised."""

    @property
    def needs(self) -> Needs:
        return Needs(teacher_k=1, mass_outside=_outside_topk(self.tail))


class GeneralizedJSDSettings(LossSection):
    """GKD's divergence between student and teacher through their mixture."""

    kind: Literal["generalized_jsd"] = "generalized_jsd"
    beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share of the mixture, at least 0.001 from both ends: small is near forward,
    large near reverse KL."""

    @field_validator("beta")
    @classmethod
    def _beta_learns(cls, beta: float) -> float:
        """The divergence is of the order of its smaller share, and so is what is learnt."""
        if not MIN_SHARE <= beta <= 1.0 - MIN_SHARE:
            end = "forward_kl" if beta < 0.5 else "truncated_reverse_kl with loss.tail"
            raise ValueError(
                f"beta is {beta:g}, and must be from {MIN_SHARE:g} to {1.0 - MIN_SHARE:g}: beyond, "
                f"divergence and gradient are next to nothing; loss {end} is that end, undivided"
            )
        return beta

    @property
    def needs(self) -> Needs:
        return Needs(teacher_k=1, mass_outside="teacher_topk")


class EntropyAwareKLSettings(LossSection):
    """Reverse KL everywhere and forward KL where the teacher is unsure (2603.07079)."""

    kind: Literal["entropy_aware_kl"] = "entropy_aware_kl"
    reverse: Literal["support", "sampled"] = "support"
    """The reverse KL: over the teacher's top-k, or the clipped policy gradient of the sampled
    token, as in the released code."""
    coefficient: float = Field(1.0, gt=0)
    """Of the forward KL."""
    entropy_threshold: float = Field(0.8, ge=0)
    """Nats of teacher entropy from which the forward KL counts; that of the released code."""
    tail: bool = False
    """Divergences over one more class for everything outside the teacher's top-k."""
    clip_epsilon: Annotated[ClipEpsilon | None, ReadBy("reverse", "sampled")] = 0.2
    """PPO clip of the sampled token's ratio; none leaves it alone."""
    dual_clip: Annotated[DualClip | None, ReadBy("reverse", "sampled")] = 3.0
    """Bound of the ratio where the advantage is negative."""

    @property
    def needs(self) -> Needs:
        return Needs(
            teacher_k=1 if self.tail or self.reverse == "sampled" else 2,
            teacher_columns=("entropies",),
            behavior_logprobs=self.reverse == "sampled",
            mass_outside=_outside_topk(self.tail),
        )

    @property
    def has_a_ratio(self) -> bool:
        return self.reverse == "sampled"


class StudentTopKReverseKLSettings(PolicyGradientSection):
    """Policy gradient over the candidates of a position (Prune-OPD's code)."""

    kind: Literal["student_topk_reverse_kl"] = "student_topk_reverse_kl"
    support: RewardSupport = "only_stu"
    """Which of the student's and the teacher's top-k are candidates."""
    weight_mode: WeightMode = "student_p"
    """What a candidate's reward is weighted with; student_p is the published one."""
    clip_epsilon: ClipEpsilon | None = 0.2
    """PPO clip of each candidate's ratio; none leaves it alone."""
    dual_clip: DualClip | None = 3.0
    """Bound of a ratio where the reward is negative."""

    @property
    def needs(self) -> Needs:
        return Needs(
            teacher_k=0 if self.support == "only_stu" else 1,
            student_topk=self.support != "only_tch",
            # Every candidate of an intersection is one of the student's own.
            behavior_at_teacher_topk=self.support not in ("only_stu", "intersection"),
        )


class ResidualReverseKLSettings(PolicyGradientSection):
    """Policy gradient over the student's top-k, and of the sampled token where it is outside: the
    whole reverse KL in expectation (ResOPD)."""

    kind: Literal["residual_reverse_kl"] = "residual_reverse_kl"
    clip_epsilon: ClipEpsilon | None = 0.2
    """PPO clip of each candidate's ratio; none leaves it alone."""
    dual_clip: DualClip | None = 3.0
    """Bound of a ratio where the reward is negative."""

    @property
    def needs(self) -> Needs:
        return Needs(behavior_logprobs=True, student_topk=True)


class SuppressUnlikelySettings(PolicyGradientSection):
    """A control without a teacher: the tokens that the student itself found least likely become
    less likely (OPSA)."""

    kind: Literal["suppress_unlikely"] = "suppress_unlikely"
    share: float = Field(0.2, gt=0, le=1)
    """Of each response's tokens, rounded down, at least one: the least likely."""
    advantage: float = Field(-1.0, lt=0)
    """Of each of them, in place of a teacher's."""
    clip_epsilon: ClipEpsilon | None = 0.2
    """PPO clip of the ratio; none leaves it alone."""
    dual_clip: DualClip | None = 3.0
    """Bound of the ratio."""

    @property
    def needs(self) -> Needs:
        return Needs(behavior_logprobs=True)


class ImportedLossSettings(LossSection):
    """A loss of your own (docs/own-loss.md). What it needs it declares itself: known once imported,
    which is before anything starts."""

    kind: Literal["import"] = "import"
    path: str = Field(pattern=r"^\w+(\.\w+)*:\w+$")
    """package.module:function, importable from the current directory or where Python looks."""
    options: dict[str, JsonValue] = Field({})
    """Passed to the function by name; which there are is its own affair."""
    _needs: Needs = PrivateAttr(Needs())

    @property
    def needs(self) -> Needs:
        return self._needs

    @property
    def name(self) -> str:
        return self.path

    def declaring(self, needs: Needs) -> Self:
        """The same, once it is known what the function needs."""
        declared = self.model_copy()
        declared._needs = needs
        return declared


LossSettings = Annotated[
    SampledReverseKLSettings
    | LocalSupportMatchingSettings
    | TruncatedReverseKLSettings
    | ForwardKLSettings
    | GeneralizedJSDSettings
    | EntropyAwareKLSettings
    | StudentTopKReverseKLSettings
    | ResidualReverseKLSettings
    | SuppressUnlikelySettings
    | ImportedLossSettings,
    Field(discriminator="kind"),
]
