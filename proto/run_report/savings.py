"""What stopping rollouts in flight saved, against two cases that did not happen.

Nobody knows how long a stopped rollout would have become. So there are two figures:

    at most    each had gone on to the budget of its step
    likely     each had become as long as the mean of those of its step that ended otherwise, where
               that is longer than it was when generation had ended

Tokens that were generated past a stop are spent, not saved. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from run_report.figures import Profile, RunFigures

TRUNCATED = "truncated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Tokens of a run, or of a step; None: not known."""

    generated: int = 0
    kept: int = 0
    stopped: int = 0
    """Rollouts that were stopped."""
    past_stop: int = 0
    """Generated past the point of the verdict."""
    saved_at_most: int | None = None
    saved_likely: int | None = None

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            generated=self.generated + other.generated,
            kept=self.kept + other.kept,
            stopped=self.stopped + other.stopped,
            past_stop=self.past_stop + other.past_stop,
            saved_at_most=_sum(self.saved_at_most, other.saved_at_most),
            saved_likely=_sum(self.saved_likely, other.saved_likely),
        )


NOTHING = Spent(saved_at_most=0, saved_likely=0)


def spent_by_step(run: RunFigures) -> dict[int, Spent]:
    """Of every step whose rollouts are known."""
    return {
        step: spent(profile, run.budgets.get(step))
        for step, profile in sorted(run.profiles.items())
    }


def spent(profile: Profile, budget: int | None) -> Spent:
    """Of one step, whose rollouts might have had `budget` tokens."""
    rows = list(zip(profile.lengths, profile.generated, profile.finish, strict=True))
    stopped = [(kept, made) for kept, made, finish in rows if finish == TRUNCATED]
    ended = [made for _, made, finish in rows if finish != TRUNCATED]
    mean = sum(ended) / len(ended) if ended else None
    return Spent(
        generated=sum(profile.generated),
        kept=sum(profile.lengths),
        stopped=len(stopped),
        past_stop=sum(made - kept for kept, made in stopped),
        saved_at_most=_beyond(stopped, budget),
        saved_likely=_beyond(stopped, mean),
    )


def total(steps: Mapping[int, Spent]) -> Spent:
    """Of all steps; a saving that one of them does not know is not known."""
    return sum(steps.values(), NOTHING)


def seconds_saved(run: RunFigures, tokens: int | None) -> float | None:
    """Seconds of generation that so many tokens would have taken, at the run's own mean speed."""
    _, seconds = run.series("seconds_generate")
    _, generated = run.series("generated_tokens")
    if tokens is None or not len(seconds) or not generated.sum():
        return None
    return float(tokens * seconds.sum() / generated.sum())


def _beyond(stopped: list[tuple[int, int]], length: float | None) -> int | None:
    if not stopped:
        return 0
    if length is None:
        return None
    return round(sum(max(0.0, length - made) for _, made in stopped))


def _sum(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left + right
