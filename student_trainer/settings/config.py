"""The trainer's settings: one frozen tree, read from TOML, overridden by `--set section.key=value`.

Every experiment is one file; nothing else changes what a run does. Thresholds of the drift policy
live here and travel to the teacher with each session. A combination that cannot work is refused
here.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from student_trainer.errors import ConfigError
from student_trainer.settings.best_metric import why_no_best
from student_trainer.settings.budget import (
    FixedBudgetSettings,
    ProgressiveBudgetSettings,
    PruneBudgetSettings,
    QuantileBudgetSettings,
)
from student_trainer.settings.data import DataSettings
from student_trainer.settings.drift import DriftSettings, OverlapRatioSettings
from student_trainer.settings.evaluation import EvalSettings
from student_trainer.settings.lora import LoraSettings
from student_trainer.settings.loss import ImportedLossSettings, LossSettings, Needs
from student_trainer.settings.problems import explain
from student_trainer.settings.run import (
    CheckpointSettings,
    MetricsSettings,
    RecordingSettings,
    RunSettings,
    TrackerSettings,
)
from student_trainer.settings.sampler import (
    HfBatchedSamplerSettings,
    SamplerSettings,
    VllmSamplerSettings,
    why_not,
)
from student_trainer.settings.section import MayChange, Section
from student_trainer.settings.teacher import NamedTeacherSettings, TeacherName, TeacherSettings
from student_trainer.settings.weights import WeightSettings
from teacher_wire.drift_metrics import METRICS

Beta = Annotated[float, Field(ge=0, lt=1)]
BAD_BUDGETS = 3
"""Of the default `drift.w_drop`: bad events at a third of the first budget use R up."""


class StudentSettings(Section):
    """The model that learns."""

    model: str
    """Folder or name of a Hugging Face checkpoint, with its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the learner. Weights that are learnt, gradients and the optimizer's state are
    float32 with either, so that bfloat16 loses no update; a frozen base is held in it."""
    device: Annotated[str, MayChange()] = "auto"
    """Where the learner runs: "cpu", "cuda", "cuda:1"; "auto" takes CUDA when there is one."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention of the learner: PyTorch's fused one (sdpa), the plain one, or the package
    flash-attn with bfloat16. "auto" is sdpa wherever it is right for the model."""
    gradient_checkpointing: Annotated[bool, MayChange()] = False
    """Keeps the input of each layer alone for the backward pass and makes the rest again: the same
    gradient, a fraction of the memory, a third more time."""
    lora: LoraSettings | None = None
    """A low-rank adapter is trained in place of the weights; none: all of them are."""


class RolloutSettings(Section):
    """How the student is sampled, and what travels to the teacher with every token."""

    prompts_per_step: int = Field(gt=0)
    """Problems in one batch; at most as many as the training data has."""
    rollouts_per_prompt: int = Field(1, gt=0)
    """Responses sampled to each problem."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling; student and teacher are compared at it."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of sampling, as a share of probability; 1 samples from the whole distribution."""
    student_topk: int = Field(16, ge=0)
    """The student's own top-k that is sent to the teacher with every token (J); 0 sends none,
    and so does a `top_p` below 1, outside of which candidates are arbitrary."""
    chunk_tokens: int = Field(32, gt=0)
    """Tokens a rollout gathers before they are sent to be scored."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response, besides the end token of the student's tokenizer and those of its
    generation_config."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Text that ends a response: the token with which one of them is complete is its last."""
    max_staleness: int = Field(0, ge=0, le=2)
    """Optimisation rounds by which the weights that began a rollout may be older than those that
    learn from it. 0: rollouts are generated when the learner asks for them, and it waits. 1: they
    are while it works, and go on with each step's weights as soon as there are any. 2: those of the
    step after next begin where a few long ones would leave the sampler with little to do."""
    tokens_per_step: int | None = Field(None, gt=0)
    """Response tokens that a step has at least: where its rollouts have fewer, because they were
    stopped, more prompts are taken up. None: whatever they have."""
    max_context: int = Field(gt=1)
    """Tokens of prompt plus response; the teacher's `max_context` must be as large."""


class SpecialTokenSettings(Section):
    """Tokens on which a student and a teacher of one family differ for no good reason."""

    tokens: tuple[str, ...] = ()
    """Tokens that are masked: no loss, no drift event, no weight."""
    occurrences: Literal["first", "all"] = "first"
    """Whether only the first of each in a response is masked."""


class OptimSettings(Section):
    """How the student learns from a batch of rollouts: AdamW."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps AdamW's two running means in a byte each, 2 bytes a weight for 8 (needs the
    extra `eightbit`)."""
    learning_rate: float = Field(gt=0)
    """After the warm-up."""
    final_learning_rate: float = Field(0.0, ge=0)
    """Reached by a cosine over the whole run."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from nought."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Of AdamW's two running means."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which the gradient of an update is clipped."""
    epochs: int = Field(1, gt=0)
    """Passes over one batch of rollouts."""
    updates_per_epoch: int = Field(1, gt=0)
    """Optimiser steps a pass."""
    micro_batch_tokens: Annotated[int, MayChange()] = Field(16384, gt=0)
    """Padded tokens in one forward pass; changes memory, not the gradient."""
    max_sync_gap_nats: Annotated[float | None, MayChange()] = Field(None, gt=0)
    """Largest difference between the sampler's and the learner's log-probs, before the first
    rollout and after a sync, nats; none: 0.001 where both compute in float32, else 0.5."""


class TrainerConfig(Section):
    """Everything a run depends on."""

    run: RunSettings
    student: StudentSettings
    sampler: SamplerSettings = VllmSamplerSettings()
    data: DataSettings
    rollout: RolloutSettings
    teacher: TeacherSettings
    teachers: dict[TeacherName, NamedTeacherSettings] = Field({})
    """Further teachers by name."""
    drift: DriftSettings = OverlapRatioSettings()
    budget: Annotated[
        FixedBudgetSettings
        | PruneBudgetSettings
        | ProgressiveBudgetSettings
        | QuantileBudgetSettings,
        Field(discriminator="kind"),
    ]
    loss: LossSettings
    weights: WeightSettings = WeightSettings()
    special_tokens: SpecialTokenSettings = SpecialTokenSettings()
    optim: OptimSettings
    eval: EvalSettings = EvalSettings()
    checkpoint: Annotated[CheckpointSettings, MayChange()] = CheckpointSettings()
    recording: Annotated[RecordingSettings, MayChange()] = RecordingSettings()
    trackers: Annotated[TrackerSettings, MayChange()] = TrackerSettings()
    metrics: Annotated[MetricsSettings, MayChange()] = MetricsSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for tag, teacher in self.teachers_by_tag.items():
            self._check_drift(tag, teacher.k)
        if self.longest_response >= self.rollout.max_context:
            raise ValueError(
                f"the largest budget is {self.longest_response} tokens and must leave room for a "
                f"prompt in rollout.max_context {self.rollout.max_context}"
            )
        if self.data.heldout is not None and self.eval.max_tokens >= self.rollout.max_context:
            raise ValueError(
                f"eval.max_tokens is {self.eval.max_tokens} and must leave room for a prompt in "
                f"rollout.max_context {self.rollout.max_context}"
            )
        self._check_shared_weights()
        if why := why_no_best(self.checkpoint, self.data, self.eval):
            raise ValueError(why)
        if why := why_not(self.sampler, self.student.lora, self.rollout.max_staleness):
            raise ValueError(why)
        return self

    def _check_shared_weights(self) -> None:
        """That a sampler that is to share the learner's weights can."""
        sampler = self.sampler
        if not isinstance(sampler, HfBatchedSamplerSettings) or sampler.weights != "shared":
            return
        if why := self.why_not_shared:
            raise ValueError(
                f"sampler.weights is 'shared', and {why}: 'copied', or 'auto' for whichever can be"
            )

    def _check_drift(self, tag: str | None, teacher_k: int) -> None:
        """That what a teacher's drift policy compares is there."""
        drift, topk, top_p = self.drift_of(tag), self.rollout.student_topk, self.rollout.top_p
        k, table = drift.k, table_of(tag)
        name = "drift" if tag is None or self.teachers[tag].drift is None else f"{table}.drift"
        if k > teacher_k:
            raise ValueError(f"{name}.k is {k}, more than the {table}.k {teacher_k} it compares")
        compares = METRICS[drift.metric].compares_candidates
        if compares and k > topk:
            raise ValueError(
                f"{name}.k is {k}, more than the rollout.student_topk {topk} it compares"
            )
        if compares and top_p < 1.0:
            raise ValueError(
                f"{name}.metric {drift.metric} with rollout.top_p {top_p}: the "
                "student's top-k outside its nucleus is arbitrary; use teacher_top_p_accept"
            )
        if k != self.drift.k:
            raise ValueError(
                f"{name}.k is {k} and drift.k {self.drift.k}: overlaps of different sizes cannot "
                "stand in one report"
            )
        w_drop, of_the_run = self.w_drop_of(tag), self.w_drop_of(None)
        if self.weights.prune is not None and w_drop != of_the_run:
            raise ValueError(
                f"{name}.w_drop is {w_drop:g} and drift.w_drop {of_the_run:g}: "
                "weights.prune takes the reliability of every token by one of them"
            )

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        if self.weights.importance_ratio is not None and self.loss.has_a_ratio:
            raise ValueError(
                f"weights.importance_ratio with loss {self.loss.kind}: its surrogate already holds "
                "the policy ratio, which would count twice"
            )
        self._check_needs_of_loss()
        return self

    def _check_needs_of_loss(self) -> None:
        name, needs, rollout = self.loss.name, self.loss.needs, self.rollout
        if needs.student_topk and rollout.student_topk == 0:
            raise ValueError(
                f"loss {name} sums over the student's top-k and needs rollout.student_topk > 0, it "
                "is 0"
            )
        if needs.student_topk and rollout.top_p < 1.0:
            raise ValueError(
                f"loss {name} sums over the student's top-k and needs the behavior policy's full "
                f"distribution, but rollout.top_p is {rollout.top_p}: ids outside the nucleus are "
                "arbitrary and have no log-prob"
            )
        for tag, teacher in self.teachers_by_tag.items():
            setting = f"{table_of(tag)}.k"
            if needs.teacher_k == 2 > teacher.k and self.loss.kind != "import":
                raise ValueError(
                    f"loss {name} renormalises on the teacher's top-k and is 0 on a single token: "
                    f"{setting} must be at least 2, or loss.tail true"
                )
            if needs.teacher_k > teacher.k:
                raise ValueError(
                    f"loss {name} needs a {setting} of at least {needs.teacher_k}, it is "
                    f"{teacher.k}"
                )

    def with_needs(self, needs: Needs) -> TrainerConfig:
        """The same with an imported loss of which it is known what it needs. Raises ConfigError."""
        assert isinstance(self.loss, ImportedLossSettings)
        config = self.model_copy(update={"loss": self.loss.declaring(needs)})
        try:
            config._check_needs_of_loss()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return config

    @property
    def why_not_shared(self) -> str | None:
        """Why no sampler can generate with the learner's own weights; None where one can."""
        if self.student.dtype != "float32":
            return f"student.dtype is {self.student.dtype!r}, whose weights are float32"
        if self.sampler.dtype not in ("auto", "float32"):
            return f"sampler.dtype is {self.sampler.dtype!r} and the learner's weights are float32"
        if (staleness := self.rollout.max_staleness) > 0:
            return f"rollout.max_staleness is {staleness}: it generates while they change"
        return None

    @property
    def collected_topk(self) -> int:
        """How many of the student's candidates travel with every token: none under top-p, where
        those outside the nucleus are arbitrary, and whatever compares candidates is refused."""
        return self.rollout.student_topk if self.rollout.top_p == 1.0 else 0

    @property
    def overlap_k(self) -> int | None:
        """Entries that the overlap compares: as far as both lists go; None without candidates."""
        if self.collected_topk == 0:
            return None
        return min(self.drift.k, self.collected_topk, self.teacher.k)

    @property
    def teachers_by_tag(self) -> dict[str | None, TeacherSettings]:
        """Every teacher by what a row calls it; None: the rows that name none."""
        return {tag: self.teacher_of(tag) for tag in (None, *self.teachers)}

    def teacher_of(self, tag: str | None) -> TeacherSettings:
        """The teacher of the rows that call it so."""
        return self.teacher if tag is None else self.teachers[tag]

    def drift_of(self, tag: str | None) -> DriftSettings:
        """The drift policy of a teacher: its own, or the run's."""
        own = None if tag is None else self.teachers[tag].drift
        return self.drift if own is None else own

    def w_drop_of(self, tag: str | None) -> float:
        """Reliability that a bad event costs a response of a teacher's."""
        given = self.drift_of(tag).w_drop
        return min(1.0, BAD_BUDGETS / self.first_budget) if given is None else given

    @property
    def first_budget(self) -> int:
        """Response tokens that a rollout of the first step may have. A rule that stops at no less
        than what the budget may come to would let it grow on bad events alone."""
        return self.budget.max_tokens if self.budget.kind == "fixed" else self.budget.initial

    @property
    def longest_response(self) -> int:
        """The most tokens that the budget may ever give a rollout."""
        return self.budget.max_tokens if self.budget.kind == "fixed" else self.budget.maximum

    @property
    def needs_learner_behavior(self) -> bool:
        """Whether behavior log-probs must come from the learner: at ids that only the teacher named
        nobody else has them; under top-p the sampler's are renormalised on its nucleus and cannot
        be compared with the learner's."""
        compares = (
            self.loss.needs.behavior_logprobs
            or self.weights.prefix_importance is not None
            or self.weights.block_gate is not None
            or self.weights.importance_ratio is not None
        )
        nucleus = self.rollout.top_p < 1.0
        return self.loss.needs.behavior_at_teacher_topk or (compares and nucleus)


def table_of(tag: str | None) -> str:
    """The table in which a teacher's settings stand."""
    return "teacher" if tag is None else f"teachers.{tag}"


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainerConfig:
    """Reads a TOML file, applies `section.key=value` overrides, checks everything.

    The config.json of a run is taken too. A value is JSON where it parses as JSON, else a string.
    Raises ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path}: not {kind}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be an object of settings")
    for override in overrides:
        _apply_override(tree, override)
    try:
        return TrainerConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(error, TrainerConfig)}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r} must look like section.key=value")
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[leaf] = json.loads(text)
    except json.JSONDecodeError:
        node[leaf] = text
