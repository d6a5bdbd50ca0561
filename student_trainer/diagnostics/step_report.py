"""What one step of a run came to, as one record that the loop makes and alarms and reports read.

A field's name is its name in metrics.jsonl; docs/diagnostics.md explains each. What a step says
nothing about is None here and absent there. Knows neither how a value came about nor where it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

Record = TypeVar("Record", "LearnReport", "RolloutReport", "StepReport", "EvalReport")


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
class EvalReport:
    """One evaluation of the weights after `step` steps."""

    step: int
    accuracy: float
    pass_at_1: float | None = None
    pass_at_k: float | None = None
    mean_tokens: float | None = None

    def values(self) -> dict[str, float]:
        """Name -> value of every result that is there."""
        return _present(self)

    @classmethod
    def from_values(cls, step: int, values: Mapping[str, Any]) -> EvalReport:
        """The evaluation that wrote these values. Raises KeyError naming those that are missing."""
        return _read(cls, {**values, "step": step})


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
