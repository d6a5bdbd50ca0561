"""Settings of the loss: what one position costs. What a setting means is in docs/methods.md.

Each section says what it needs of the rest of the run; `TrainerConfig` checks that it is there.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from student_trainer.settings.section import Section

ClipEpsilon = Annotated[float, Field(gt=0, lt=1)]
DualClip = Annotated[float, Field(gt=1)]


class LossSection(Section):
    """What a loss needs; the answers of one that only looks at the teacher's top-k."""

    @property
    def needs_student_topk(self) -> bool:
        """Whether it sums over the student's top-k."""
        return False

    @property
    def teacher_columns(self) -> tuple[str, ...]:
        """Columns that the teacher must return besides those that every row has."""
        return ()

    @property
    def needs_behavior_at_teacher_topk(self) -> bool:
        """Whether it compares with the behavior policy at ids that only the teacher named."""
        return False

    @property
    def compares_with_behavior(self) -> bool:
        """Whether it compares the sampled token's log-probs with the behavior policy's."""
        return False

    @property
    def renormalizes_on_teacher_topk(self) -> bool:
        """Whether student and teacher are renormalised on the teacher's top-k alone."""
        return False


class SampledReverseKLSettings(LossSection):
    kind: Literal["sampled_reverse_kl"]
    clip_epsilon: ClipEpsilon | None = 0.2
    """PPO clip of the ratio; none leaves it alone."""
    dual_clip: DualClip | None = 3.0
    """Bound of the ratio where the advantage is negative."""

    @property
    def compares_with_behavior(self) -> bool:
        return True


class LocalSupportMatchingSettings(LossSection):
    """Reverse KL on a support, renormalised there (Revisiting OPD)."""

    kind: Literal["local_support_matching"]
    support: Literal["teacher_topk", "student_topk_and_sampled", "teacher_topk_and_sampled"] = (
        "teacher_topk"
    )
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
    def needs_student_topk(self) -> bool:
        return self.support == "student_topk_and_sampled"

    @property
    def renormalizes_on_teacher_topk(self) -> bool:
        return self.support == "teacher_topk" and not self.tail


class TruncatedReverseKLSettings(LossSection):
    """Local support matching without renormalising: an ablation; with a tail, a divergence."""

    kind: Literal["truncated_reverse_kl"]
    tail: bool
    """Everything outside the support as one more class."""


class ForwardKLSettings(LossSection):
    """KL from the teacher over its top-k (GKD)."""

    kind: Literal["forward_kl"]
    tail: bool = True
    """Everything outside the support as one more class; without, the teacher is renormalised."""


class GeneralizedJSDSettings(LossSection):
    """GKD's divergence between student and teacher through their mixture."""

    kind: Literal["generalized_jsd"]
    beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share of the mixture: small is near forward, large near reverse KL."""


class EntropyAwareKLSettings(LossSection):
    """Reverse KL everywhere and forward KL where the teacher is unsure (2603.07079)."""

    kind: Literal["entropy_aware_kl"]
    entropy_threshold: float = Field(0.8, ge=0)
    """Nats of teacher entropy from which the forward KL counts; a third party's value."""
    tail: bool = False
    """Both over one more class for everything outside the teacher's top-k."""

    @property
    def teacher_columns(self) -> tuple[str, ...]:
        return ("entropies",)

    @property
    def renormalizes_on_teacher_topk(self) -> bool:
        return not self.tail


class StudentTopKReverseKLSettings(LossSection):
    """Policy gradient over the candidates of a position (Prune-OPD's code)."""

    kind: Literal["student_topk_reverse_kl"]
    support: Literal["only_stu", "only_tch", "intersection", "union", "symmetric_difference"] = (
        "only_stu"
    )
    """Which of the student's and the teacher's top-k are candidates."""
    weight_mode: Literal["student_p", "teacher_p", "uniform"] = "student_p"
    """What a candidate's reward is weighted with; student_p is the published one."""
    clip_epsilon: ClipEpsilon | None = 0.2
    """PPO clip of each candidate's ratio; none leaves it alone."""
    dual_clip: DualClip | None = 3.0
    """Bound of a ratio where the reward is negative."""

    @property
    def needs_student_topk(self) -> bool:
        return self.support != "only_tch"

    @property
    def needs_behavior_at_teacher_topk(self) -> bool:
        # Every candidate of an intersection is one of the student's own.
        return self.support in ("only_tch", "union", "symmetric_difference")


LossSettings = Annotated[
    SampledReverseKLSettings
    | LocalSupportMatchingSettings
    | TruncatedReverseKLSettings
    | ForwardKLSettings
    | GeneralizedJSDSettings
    | EntropyAwareKLSettings
    | StudentTopKReverseKLSettings,
    Field(discriminator="kind"),
]
