"""When the numbers of a step say that the run is being wasted. Thresholds are rules of thumb.

The reasons and remedies stand in docs/diagnostics.md. No warning stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from student_trainer.diagnostics.step_report import (
    LearnReport,
    MismatchedToken,
    RolloutReport,
    StepReport,
)

MIN_SUPPORT_MASS = 0.5
"""Below, most of the student's probability is where local support matching has no gradient."""
SUPPORT_MASS_DROP = 0.5
"""Share of the first step's mass that is an alarm, whatever the mass was."""
MAX_BAD_EVENT_RATE = 0.9
"""Two tokenizers, or a k and threshold that no pair meets, give nearly 1. Prune-OPD's least
compatible pairs come near it: 100 bad events within their first 100 to 400 tokens."""
MIN_EFFECTIVE_TOKENS = 10
EXHAUSTED_MAJORITY = 0.5
"""Short answers have a short E too; it is drift if at least this share of rollouts ran out of R."""
MAX_UNRELIABLE_SHARE = 0.8
MAX_REPETITION_RATE = 0.3
MAX_WEIGHT_RATIO = 100.0
"""As published, prune weights span 1 to 3, prefix importance 1 to 1.5, a gate 1 to e a nat."""
MAX_WEIGHT_OVER_MEAN = 20.0
"""With a smallest weight of 0 the ratio says nothing; this does."""
MAX_TOKENS_NAMED = 5
MIN_ENTROPY_RISE = 0.05
"""Share of the first step's. A step's entropy has a standard error of 0.03 to 0.1 nats."""
MIN_MASS_LOSS = 0.03
"""Of the student's own top-k, beyond what the teacher's lost; a language model's went 0.93 to 0.87
in nine steps of a loss that spreads it out."""


_REMEDIES_FOR_MASS = {
    False: "local support matching cannot bring it back. Raise teacher.k, lower rollout.top_p, or "
    "use a loss with a tail",
    True: "the loss with its tail brings it back slowly, or not at all where the learning rate or "
    "the weights are too small. Raise teacher.k, lower rollout.top_p, or raise "
    "optim.learning_rate",
}
"""By whether the loss has a tail."""
_WHERE_ALL_IS_NOUGHT = {
    "prune": "raise weights.prune.w_base",
    "position_window": "widen weights.position_window",
    "entropy_top": "raise weights.entropy_top.ratio",
    "importance_ratio": 'weights.importance_ratio.mode "truncate", or a wider range',
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What of a run's settings decides which remedy there is."""

    loss_has_tail: bool = False
    """The mass outside the teacher's top-k has a class, and with it a gradient."""
    weights: tuple[str, ...] = ()
    """Tables of [weights] that are on."""


Kind = Literal[
    "support_mass",
    "bad_events",
    "effective_length",
    "unreliable",
    "repetition",
    "spreading",
    "no_tokens",
    "weights",
    "unscored",
    "mismatched_tokens",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One warning."""

    kind: Kind
    """The same at every step at which it holds."""
    message: str


def warnings_of(
    report: StepReport,
    *,
    first: StepReport | None,
    decode: Callable[[int], str] = str,
    method: Method | None = None,
) -> list[Alarm]:
    """What is wrong with a step, given the run's first step; None where it is not known.

    What the report does not say gives no warning. `decode` gives the text of a token id.
    """
    found: list[Alarm] = []
    method = method or Method()
    if (learning := report.learning) is not None:
        before = None if first is None else first.learning
        found += [*_support(learning, before, method), *_learning(learning, method)]
    if report.generation is not None:
        found += _drift(report.generation)
    if first is not None:
        found += _spread(report, first)
    found += _teacher(report)
    if report.profile is not None and (mismatched := report.profile.mismatched_tokens):
        found.append(Alarm(kind="mismatched_tokens", message=_mismatch(mismatched, decode)))
    return found


def _support(learning: LearnReport, first: LearnReport | None, method: Method) -> Iterator[Alarm]:
    if (mass := learning.student_mass_at_teacher_topk) is None:
        return
    before = None if first is None else first.student_mass_at_teacher_topk
    if before is None:
        before = mass
    if mass < MIN_SUPPORT_MASS or mass < SUPPORT_MASS_DROP * before:
        yield Alarm(
            kind="support_mass",
            message=f"the student's mass on the teacher's top-k is {mass:.2f} ({before:.2f} in the "
            f"first step): {_REMEDIES_FOR_MASS[method.loss_has_tail]}",
        )


def _drift(rollouts: RolloutReport) -> Iterator[Alarm]:
    if (rate := rollouts.bad_event_rate or 0.0) > MAX_BAD_EVENT_RATE:
        yield Alarm(
            kind="bad_events",
            message=f"{rate:.0%} of the tokens are bad events: drift.k and drift.threshold do not "
            "fit this pair, or the two tokenizers or chat templates differ",
        )
    effective, exhausted = rollouts.effective_length_p50, rollouts.exhausted_rate or 0.0
    if effective < MIN_EFFECTIVE_TOKENS and exhausted >= EXHAUSTED_MAJORITY:
        yield Alarm(
            kind="effective_length",
            message=f"half of the rollouts drift away within {effective:.0f} tokens, "
            f"{exhausted:.0%} of them in all: nearly nothing is learnt from. Lower drift.w_drop or "
            "drift.threshold, or start from a student nearer to the teacher",
        )
    if (share := rollouts.unreliable_share or 0.0) > MAX_UNRELIABLE_SHARE:
        yield Alarm(
            kind="unreliable",
            message=f"{share:.0%} of the tokens come after R reached 0: lower the budget, or set "
            "drift.stop_in_flight",
        )
    if (rate := rollouts.repetition_rate) > MAX_REPETITION_RATE:
        yield Alarm(
            kind="repetition",
            message=f"{rate:.0%} of the tokens continue a loop: look at the responses before "
            "trusting a falling loss; a teacher agrees with a loop once it is in one",
        )


def _spread(report: StepReport, first: StepReport) -> Iterator[Alarm]:
    """Entropy rises and the student's own top-k loses mass while the overlap improves: each alone
    has other reasons, and loss and reverse KL go on falling meanwhile."""
    before, now = _breadth(first), _breadth(report)
    if before is None or now is None:
        return
    lost = before.own_mass - now.own_mass
    wider = now.entropy > (1 + MIN_ENTROPY_RISE) * before.entropy and lost > MIN_MASS_LOSS
    if wider and now.overlap > before.overlap:
        yield Alarm(
            kind="spreading",
            message=f"the student spreads out: its entropy went from {before.entropy:.2f} to "
            f"{now.entropy:.2f} nats and its own top-k lost {lost:.2f} of mass against the "
            "teacher's, while the overlap improves. See whether the teacher's log-prob of its "
            "responses falls; on language prefer truncated_reverse_kl with loss.tail, or "
            "local_support_matching",
        )


@dataclass(frozen=True, slots=True)
class _Breadth:
    """How broad the student's distribution is, and how it fits the teacher's."""

    entropy: float
    own_mass: float
    """On its own top-k, above the teacher's on its own."""
    overlap: float


def _breadth(report: StepReport) -> _Breadth | None:
    """None where a step says too little."""
    learning, rollouts = report.learning, report.generation
    if learning is None or rollouts is None:
        return None
    student, teacher = learning.behavior_mass_at_student_topk, learning.teacher_mass_at_teacher_topk
    entropy, overlap = rollouts.behavior_entropy, rollouts.overlap
    if student is None or teacher is None or entropy is None or overlap is None:
        return None
    return _Breadth(entropy, student - teacher, overlap)


def _learning(learning: LearnReport, method: Method) -> Iterator[Alarm]:
    if learning.loss_tokens == 0.0:
        yield Alarm(
            kind="no_tokens",
            message="no token counted, nothing was learnt: special_tokens masks all of them",
        )
    low, mean, high = learning.weight_min, learning.weight_mean, learning.weight_max
    if low is None or mean is None or high is None:
        return
    if high <= 0.0:
        message = f"every weight is 0, nothing was learnt: {_remedy_for_nothing(method)}"
    elif high > MAX_WEIGHT_OVER_MEAN * mean or 0.0 < low * MAX_WEIGHT_RATIO < high:
        message = (
            f"weights go from {low:.2g} to {high:.2g}, mean {mean:.2g}: a few tokens decide the "
            "step. Lower weights.block_gate.tau, or use fewer optimizer steps on one batch"
        )
    else:
        return
    yield Alarm(kind="weights", message=message)


def _remedy_for_nothing(method: Method) -> str:
    """By the weights that can be 0."""
    advice = [_WHERE_ALL_IS_NOUGHT[name] for name in method.weights if name in _WHERE_ALL_IS_NOUGHT]
    if len(advice) > 1:
        return f"together they leave no token; {', or '.join(advice)}"
    return advice[0] if advice else "look at the settings under [weights]"


def _teacher(report: StepReport) -> Iterator[Alarm]:
    unscored = report.unscored_rollouts
    partly = 0 if report.generation is None else report.generation.partly_scored_rollouts
    if unscored or partly:
        yield Alarm(
            kind="unscored",
            message=f"the teacher stayed away: {unscored} rollouts are lost, {partly} are "
            "scored in part. The step is smaller than configured; see the teacher's log",
        )


def _mismatch(mismatched: Sequence[MismatchedToken], decode: Callable[[int], str]) -> str:
    named = ", ".join(
        f"{decode(token['token_id'])!r} (id {token['token_id']}, {token['rollouts']} rollouts, "
        f"teacher {token['teacher_logprob']:.1f}, student {token['behavior_logprob']:.2f} nats)"
        for token in mismatched[:MAX_TOKENS_NAMED]
    )
    more = len(mismatched) - MAX_TOKENS_NAMED
    return (
        f"the student is sure of tokens that the teacher excludes: {named}"
        f"{f' and {more} more' if more > 0 else ''}. If they are special tokens or parts of the "
        "chat template put them under special_tokens.tokens (there already: set occurrences to all)"
    )
