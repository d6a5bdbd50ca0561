"""What one step of a run came to, as one record that the loop makes and alarms and reports read.

A field's name is its name in metrics.jsonl; docs/diagnostics.md explains each. What a step says
nothing about is None here and absent there. Knows neither how a value came about nor where it goes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, TypedDict, TypeVar

Record = TypeVar("Record", "LearnReport", "RolloutReport", "StepReport", "HeldoutReport")


class MismatchedToken(TypedDict):
    """One token id; the means are over its counted positions below the teacher's floor."""

    token_id: int
    rollouts: int
    teacher_logprob: float
    behavior_logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnReport:
    """What the updates of a step did; means over counted tokens, None where no token counted."""

    loss: float
    loss_tokens: float
    grad_norm: float
    learning_rate: float
    updates: int
    lost_in_rounding: float | None = None
    weight_mean: float | None = None
    weight_min: float | None = None
    weight_max: float | None = None
    reverse_kl: float | None = None
    student_mass_at_teacher_topk: float | None = None
    teacher_mass_at_teacher_topk: float | None = None
    behavior_mass_at_student_topk: float | None = None
    teacher_mass_at_student_topk: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """What the rollouts of a step were: token counts are totals, lengths and rates are means."""

    rollouts: int
    generated_tokens: int
    kept_tokens: int
    length_mean: float
    length_p90: float
    staleness_min_version: int
    truncated_rollouts: int
    partly_scored_rollouts: int
    truncation_rate: float
    ended_by_student: float
    ended_by_length: float
    overshoot_tokens: int
    effective_length_mean: float
    effective_length_p50: float
    effective_length_p90: float
    abs_advantage_per_response: float
    mismatched_token_ids: int
    repetition_rate: float
    repetition_rate_p90: float
    overshoot_mean: float | None = None
    overshoot_bound_mean: float | None = None
    overlap: float | None = None
    bad_event_rate: float | None = None
    exhausted_rate: float | None = None
    unreliable_share: float | None = None
    reverse_kl_first_third: float | None = None
    reverse_kl_middle_third: float | None = None
    reverse_kl_last_third: float | None = None
    behavior_entropy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSeconds:
    """Wall seconds of a step by phase; a phase that did not take place is None."""

    generate: float | None = None
    teacher_wait: float | None = None
    learn: float | None = None
    sync: float | None = None

    @property
    def total(self) -> float:
        return sum(_present(self).values())


PHASES = tuple(entry.name for entry in fields(PhaseSeconds))
HELDOUT = "heldout_"
AT_K = ("avg_at", "pass_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What of a step is not a scalar; a line of profiles.jsonl."""

    lengths: list[int]
    """Kept tokens of every rollout; the two below likewise."""
    generated: list[int]
    finish: list[str]
    mismatched_tokens: list[MismatchedToken]
    band_tokens: int
    """Width of a position band."""
    overlap_by_band: list[float] | None = None
    rollouts_by_band: list[int] | None = None
    """Rollouts that reach each band."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleText:
    """One response as a person reads it; a line of a file in samples/."""

    prompt_id: str
    sample: int
    """Which of the responses to the prompt; 0 is the greedy one in an evaluation."""
    prompt: str
    response: str
    tokens: int
    finish: str
    temperature: float
    answer: str | None = None
    correct: bool | None = None
    """None for what has no answer, and for one that could not be graded."""
    teacher_logprob: float | None = None
    """Mean of its tokens, nats; None where the teacher did not score it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step; of one that the teacher scored nothing of, `learning` and `generation` are None."""

    step: int
    unscored_rollouts: int
    seconds: PhaseSeconds
    learning: LearnReport | None = None
    generation: RolloutReport | None = None
    sync_gap_nats: float | None = None
    """None also when the run was stopped before the weights moved."""
    max_tokens: int | None = None
    budget_hit_share: float | None = None
    generation_span_s: float | None = None
    profile: StepProfile | None = None
    samples: tuple[SampleText, ...] = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        """Of its line in metrics.jsonl."""
        return "skipped" if self.learning is None else "step"

    def values(self) -> dict[str, float]:
        """Name -> value of every scalar that is there."""
        found = {"unscored_rollouts": self.unscored_rollouts, "updates": 0, **_present(self)}
        for part in (self.learning, self.generation):
            found |= _present(part) if part is not None else {}
        return found | {f"seconds_{name}": s for name, s in _present(self.seconds).items()}

    @classmethod
    def from_values(cls, step: int, values: Mapping[str, Any]) -> StepReport:
        """The step that wrote these values. Raises KeyError naming those that are missing."""
        learning, generation = _read(LearnReport, values), _read(RolloutReport, values)
        skipped = cls.skipped_from_values(step, values)
        return replace(skipped, learning=learning, generation=generation)

    @classmethod
    def skipped_from_values(cls, step: int, values: Mapping[str, Any]) -> StepReport:
        """The step without scores that wrote these values. Raises KeyError likewise."""
        seconds = PhaseSeconds(**{name: values.get(f"seconds_{name}") for name in PHASES})
        return _read(cls, {**values, "step": step, "seconds": seconds})


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutReport:
    """Sampled responses to held-out prompts, as the teacher sees them. In nats a token, with the
    standard errors; evaluation/divergence.py defines the estimates. Names get a `heldout_` in front
    when they are written."""

    responses: int
    tokens: int
    """Counted ones, without masked special tokens."""
    unscored: int
    """Responses of which the teacher did not score everything; they are in no figure."""
    length: float | None = None
    end_rate: float | None = None
    repetition_rate: float | None = None
    reverse_kl: float | None = None
    reverse_kl_se: float | None = None
    sampled_reverse_kl: float | None = None
    sampled_reverse_kl_se: float | None = None
    forward_kl: float | None = None
    forward_kl_se: float | None = None
    teacher_logprob: float | None = None
    teacher_logprob_se: float | None = None
    student_entropy: float | None = None
    student_mass: float | None = None
    teacher_mass: float | None = None
    overlap: float | None = None
    band_tokens: int | None = None
    overlap_by_band: list[float] | None = None
    responses_by_band: list[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One evaluation of the weights after `step` steps."""

    step: int
    accuracy: float | None = None
    """Of greedy responses; None where no problem has an answer."""
    mean_tokens: float | None = None
    """Length of a greedy response."""
    ungraded: int | None = None
    """Responses whose answer could not be graded; they are in no figure."""
    avg_at_k: Mapping[int, float] = field(default_factory=dict)
    """k -> share of k samples a problem that are right."""
    pass_at_k: Mapping[int, float] = field(default_factory=dict)
    """k -> chance that one of k samples is right."""
    heldout: HeldoutReport | None = None
    samples: tuple[SampleText, ...] = field(default=(), compare=False)

    def values(self) -> dict[str, float]:
        """Name -> value of every scalar that is there."""
        at_k = {
            f"{name}_{k}": value
            for name in AT_K
            for k, value in sorted(getattr(self, f"{name}_k").items())
        }
        heldout = _present(self.heldout) if self.heldout is not None else {}
        return _present(self) | at_k | {f"{HELDOUT}{name}": v for name, v in heldout.items()}

    def written(self) -> dict[str, Any]:
        """The same with what is no scalar, but for the texts."""
        there = {} if self.heldout is None else asdict(self.heldout)
        lists = {f"{HELDOUT}{n}": value for n, value in there.items() if isinstance(value, list)}
        return {**self.values(), **lists}

    @classmethod
    def from_values(cls, step: int, values: Mapping[str, Any]) -> EvalReport:
        """The evaluation that wrote these values. Raises KeyError when it says nothing."""
        heldout = {
            name.removeprefix(HELDOUT): value
            for name, value in values.items()
            if name.startswith(HELDOUT)
        }
        if not heldout and values.get("accuracy") is None and values.get("ungraded") is None:
            raise KeyError("accuracy")
        at_k = {
            f"{name}_k": {
                int(key.removeprefix(f"{name}_")): value
                for key, value in values.items()
                if re.fullmatch(rf"{name}_\d+", key)
            }
            for name in AT_K
        }
        found: dict[str, Any] = {
            **{name: values.get(name) for name in ("accuracy", "mean_tokens", "ungraded")},
            **at_k,
            "heldout": _read(HeldoutReport, heldout) if heldout else None,
        }
        return cls(step=step, **found)


def _read(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """A record of these values. Raises KeyError naming what it must have and has not."""
    required = [f.name for f in fields(kind) if f.default is MISSING]
    if missing := [name for name in required if name not in values]:
        raise KeyError(", ".join(missing))
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})


def _present(record: Any) -> dict[str, float]:
    """The numbers of a record that are there, but for its step."""
    values = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "step"}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
