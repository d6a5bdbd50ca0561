"""Diagnostics against their definitions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.diagnostics.alarms import Method, warnings_of
from student_trainer.diagnostics.mismatch import mismatched_tokens
from student_trainer.diagnostics.repetition import (
    MAX_PERIOD,
    loop_mask,
    repetition_rate,
    slow_loop_mask,
)
from student_trainer.diagnostics.step import (
    effective_lengths,
    lengths_in_budget,
    rollout_report,
    step_profile,
)
from student_trainer.diagnostics.step_report import StepProfile
from student_trainer.records import Finish, Rollout
from student_trainer.rollouts.budget import PruneBudget
from student_trainer.settings.budget import PruneBudgetSettings
from teacher_wire.drift import advance
from teacher_wire.records import DriftPolicy, DriftState
from tests.trainer.made_reports import profile_of_one_token, step_report
from tests.trainer.made_rollouts import plain_rollout, random_rollout


def responded(
    token_ids: Sequence[int],
    *,
    behavior: Sequence[float] | None = None,
    teacher: Sequence[float] | None = None,
    mask: Sequence[int] | None = None,
) -> Rollout:
    """A response of these tokens and log-probs."""
    plain = plain_rollout(overlap_counts=[0] * len(token_ids), mask=mask and list(mask))
    zeros = np.zeros(len(token_ids), np.float32)
    return replace(
        plain,
        response_ids=np.array(token_ids, np.int32),
        behavior_logprobs=zeros if behavior is None else np.array(behavior, np.float32),
        teacher=replace(
            plain.teacher,
            token_logprobs=zeros if teacher is None else np.array(teacher, np.float32),
        ),
    )


# Effective length


def slow_effective_length(bad: Sequence[bool], mask: Sequence[bool], w_drop: float) -> int:
    """#{t: m_t = 1 and R_t > 1e-8}, R_t = clip(1 - w_drop * (bad events up to t), 0, 1)."""
    count = effective = 0
    for event, counts in zip(bad, mask, strict=True):
        count += event
        reliability = min(max(1.0 - w_drop * count, 0.0), 1.0)
        effective += counts and reliability > 1e-8
    return effective


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60),
    w_drop=st.sampled_from([0.01, 0.1, 0.25, 0.3, 1 / 3, 1.0]),
    in_flight=st.booleans(),
)
def test_effective_length_is_the_number_of_reliable_tokens(
    tokens: list[tuple[bool, bool]], w_drop: float, in_flight: bool
) -> None:
    mask = [counts for counts, _ in tokens]
    bad = [counts and event for counts, event in tokens]
    policy = DriftPolicy(w_drop=w_drop, stop_in_flight=in_flight)
    drift, _, keep = advance(policy, DriftState(), np.array(bad, np.bool_))
    kept = len(tokens) if keep is None else keep
    rollout = replace(responded([0] * kept, mask=[int(m) for m in mask[:kept]]), drift=drift)
    # A stopped rollout has the E that it would have had unstopped.
    assert effective_lengths([rollout]) == [slow_effective_length(bad, mask, w_drop)]


def test_effective_length_of_the_golden_trajectory_is_seven() -> None:
    bad = [False, False, True, False, True, True, False, True, False]
    drift, _, _ = advance(DriftPolicy(w_drop=0.25), DriftState(), np.array(bad))
    rollout = replace(responded([0] * 9), drift=drift)
    assert effective_lengths([rollout]) == [7]
    metrics = rollout_report([rollout], overlap_k=None)
    assert metrics.unreliable_share == pytest.approx(2 / 9)
    assert metrics.exhausted_rate == 1.0


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40),
    exhausted=st.integers(1, 60),
)
def test_what_others_said_before_r_reached_0_is_in_the_budget_and_not_in_e(
    tokens: list[tuple[bool, bool]], exhausted: int
) -> None:
    """The second of a pair: whether a token of the student's counts."""
    sampled, counts = ([pair[i] for pair in tokens] for i in (0, 1))
    exhausted_at = exhausted if exhausted <= len(tokens) else None
    rollout = replace(
        responded([0] * len(tokens), mask=[own and c for own, c in tokens]),
        sampled=np.array(sampled, np.bool_),
        drift=DriftState(num_tokens=len(tokens), exhausted_at=exhausted_at),
    )
    effective = others = 0
    for number, (own, count) in enumerate(zip(sampled, counts, strict=True), 1):
        if exhausted_at is None or number < exhausted_at:
            effective += own and count
            others += not own
    assert effective_lengths([rollout]) == [effective]
    assert lengths_in_budget([rollout]) == [effective + others]
    assert lengths_in_budget([replace(rollout, sampled=None)]) == [effective]


def test_a_conversation_that_used_its_budget_up_lets_it_grow() -> None:
    """With a turn far longer than the margin."""
    sampled = np.ones(2048, np.bool_)
    sampled[500:800] = False
    rollout = replace(responded([0] * 2048, mask=sampled.astype(int).tolist()), sampled=sampled)
    budget = PruneBudget(PruneBudgetSettings(initial=2048))
    assert budget.update(lengths_in_budget([rollout])) == 1.0
    assert budget.max_tokens > 2048
    stopped = replace(rollout, drift=DriftState(num_tokens=2048, exhausted_at=1001))
    assert budget.update(lengths_in_budget([stopped])) == 0.0


def test_unreliable_share_is_of_counted_tokens() -> None:
    rollout = replace(
        responded([0] * 6, mask=[0, 0, 1, 1, 1, 1]), drift=DriftState(num_tokens=6, exhausted_at=4)
    )
    calm = replace(responded([0] * 4), drift=DriftState(num_tokens=4))
    metrics = rollout_report([rollout, calm], overlap_k=None)
    assert metrics.unreliable_share == pytest.approx(3 / 8)
    assert metrics.exhausted_rate == 0.5


def test_effective_length_has_mean_median_and_tail() -> None:
    rollouts = [responded([0] * length) for length in (2, 4, 6, 8, 30)]
    metrics = rollout_report(rollouts, overlap_k=None)
    assert metrics.effective_length_mean == 10.0
    assert metrics.effective_length_p50 == 6.0
    assert metrics.effective_length_p90 == pytest.approx(8 + 0.6 * 22)


def test_ends_add_up() -> None:
    ends = [Finish.STOP, Finish.LENGTH, Finish.LENGTH, Finish.TRUNCATED, Finish.UNSCORED]
    rollouts = [replace(responded([1, 2]), finish=end) for end in ends]
    metrics = rollout_report(rollouts, overlap_k=None)
    assert metrics.ended_by_student == 0.2
    assert metrics.ended_by_length == 0.4
    assert metrics.truncation_rate == 0.2
    assert metrics.partly_scored_rollouts == 1


# Disagreement by relative position


def test_reverse_kl_by_third_of_a_worked_example() -> None:
    six = responded([0] * 6, behavior=[0, 0, -1, -1, -2, -2], teacher=[-1, -3, -1, -2, -4, -1])
    one = responded([0], behavior=[0], teacher=[-6])
    metrics = rollout_report([six, one], overlap_k=None)
    assert metrics.reverse_kl_first_third == pytest.approx((1 + 3 + 6) / 3)
    assert metrics.reverse_kl_middle_third == pytest.approx((0 + 1) / 2)
    assert metrics.reverse_kl_last_third == pytest.approx((2 - 1) / 2)
    assert metrics.abs_advantage_per_response == pytest.approx((1 + 3 + 0 + 1 + 2 + 1 + 6) / 2)


def test_thirds_are_of_what_the_student_said() -> None:
    """Six tokens of the student's, and a turn of six after the third."""
    alone = responded([0] * 6, teacher=[-1, -2, -3, -4, -5, -6])
    told = responded(
        [0] * 12,
        teacher=[-1, -2, -3, *[-50] * 6, -4, -5, -6],
        mask=[*[1] * 3, *[0] * 6, *[1] * 3],
    )
    told = replace(told, sampled=told.mask, num_generated=6)
    metrics = rollout_report([told], overlap_k=None)
    assert metrics.reverse_kl_first_third == 1.5
    assert metrics.reverse_kl_middle_third == 3.5
    assert metrics.reverse_kl_last_third == 5.5
    assert metrics == rollout_report([alone], overlap_k=None)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_thirds_and_sums_are_their_loops(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rollouts = [
        random_rollout(rng, num_response=length, masked=int(rng.integers(0, length + 1)))
        for length in lengths
    ]
    thirds: dict[str, list[float]] = {"first": [], "middle": [], "last": []}
    sums = []
    for rollout in rollouts:
        advantage_sum = 0.0
        for t in range(len(rollout)):
            if rollout.mask[t]:
                gap = float(rollout.behavior_logprobs[t]) - float(rollout.teacher.token_logprobs[t])
                name = "first" if t < len(rollout) / 3 else "middle"
                thirds["last" if t >= 2 * len(rollout) / 3 else name].append(gap)
                advantage_sum += abs(gap)
        sums.append(advantage_sum)
    metrics = rollout_report(rollouts, overlap_k=None)
    for name, gaps in thirds.items():
        assert getattr(metrics, f"reverse_kl_{name}_third") == (
            pytest.approx(np.mean(gaps), abs=1e-9) if gaps else None
        )
    assert metrics.abs_advantage_per_response == pytest.approx(np.mean(sums))


# Repetition


def test_loop_counts_from_its_first_repeat_on() -> None:
    loop = np.array([7, 8, 9] * 8, np.int32)
    assert repetition_rate(loop) == pytest.approx(1 - 3 / 24)
    text = np.arange(100, 176, dtype=np.int32)
    assert repetition_rate(np.concatenate([text, loop])) == pytest.approx(21 / 100)


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [4],
        [4] * 16,  # 15 repeats: a rule of dashes
        list(range(40)) * 2,  # said twice, which is no loop yet
        list(range(MAX_PERIOD + 1)) * 4,
    ],
    ids=["nothing", "one token", "short run", "said twice", "longer period"],
)
def test_what_is_no_loop(tokens: list[int]) -> None:
    assert repetition_rate(np.array(tokens, np.int32)) == 0.0


def test_loop_of_the_longest_period_counts_at_its_third_time() -> None:
    tokens = np.array(list(range(MAX_PERIOD)) * 3, np.int32)
    assert repetition_rate(tokens) == pytest.approx(2 / 3)
    assert repetition_rate(tokens[:-1]) == 0.0


pieces = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces, max_size=6))
def test_fast_loop_mask_is_the_definition(parts: list[tuple[list[int], int]]) -> None:
    tokens = np.array([t for passage, times in parts for t in passage * times], np.int32)
    assert loop_mask(tokens).tolist() == slow_loop_mask(tokens).tolist()
    assert 0.0 <= repetition_rate(tokens) <= 1.0


def test_repetition_of_a_step_is_mean_and_tail() -> None:
    rollouts = [responded(list(range(20)))] * 4 + [responded([5] * 20)]
    metrics = rollout_report(rollouts, overlap_k=None)
    assert metrics.repetition_rate == pytest.approx(0.95 / 5)
    assert metrics.repetition_rate_p90 == pytest.approx(0.6 * 0.95)


# Mismatched tokens


def mismatching(**changes: object) -> list[Rollout]:
    """Ten rollouts; in two of them the student is sure of token 7, and the teacher excludes it."""
    odd: dict[str, object] = {
        "behavior": [-0.25, -0.1, -0.5],
        "teacher": [-20, -1, -58],
        "mask": None,
    }
    odd |= changes
    plain = responded([7, 3, 7], behavior=[-0.25, -0.1, -0.5], teacher=[-14, -1, -14])
    return [responded([7, 3, 7], **odd)] * 2 + [plain] * 8  # type: ignore[arg-type]


def test_mismatch_of_a_worked_example() -> None:
    (found,) = mismatched_tokens(mismatching())
    assert found == {
        "token_id": 7,
        "rollouts": 2,
        "teacher_logprob": -39.0,
        "behavior_logprob": -0.375,
    }
    assert rollout_report(mismatching(), overlap_k=None).mismatched_token_ids == 1
    profile = step_profile(mismatching(), overlap_k=None)
    assert profile.mismatched_tokens == [found]
    assert StepProfile(**json.loads(json.dumps(asdict(profile)))) == profile


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": [-15, -1, -15]},
        {"behavior": [-0.75, -0.1, -0.25]},
        {"mask": [0, 1, 0]},
    ],
    ids=["the teacher allows it", "the student is not sure", "already masked"],
)
def test_what_is_no_mismatch(changes: dict[str, object]) -> None:
    assert mismatched_tokens(mismatching(**changes)) == []


def test_mismatch_needs_a_tenth_of_the_rollouts_and_two() -> None:
    rollouts = mismatching()
    assert mismatched_tokens(rollouts[1:]) == []  # one rollout, however often
    assert mismatched_tokens(rollouts[:1] * 2 + rollouts[2:] * 2) == mismatched_tokens(
        rollouts[:2] + rollouts[2:] * 2
    )
    assert mismatched_tokens(rollouts + rollouts[2:] * 2) == []  # 2 of 26


def test_most_frequent_mismatch_comes_first() -> None:
    rollouts = [responded([8], teacher=[-20])] * 2 + [responded([9], teacher=[-20])] * 3
    assert [token["token_id"] for token in mismatched_tokens(rollouts)] == [9, 8]


# Anything that a step may hold


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Rollout], int | None]:
    """Rollouts of 0 to 5 tokens, masked at will, with or without drift, overlap and candidates."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    has_drift, has_events, has_overlap = (draw(st.booleans()) for _ in range(3))
    num_candidates = 3 if has_overlap else draw(st.sampled_from([0, 3]))
    rollouts = []
    for length in draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)):
        made = random_rollout(rng, num_response=length, j=num_candidates)
        exhausted = draw(st.none() | st.integers(1, length)) if length else None
        finish = draw(st.sampled_from(Finish))
        rollouts.append(
            replace(
                made,
                mask=np.array(
                    draw(st.lists(st.booleans(), min_size=length, max_size=length)), bool
                ),
                drift=DriftState(num_tokens=length, exhausted_at=exhausted) if has_drift else None,
                finish=finish,
                teacher=replace(
                    made.teacher,
                    bad_events=made.teacher.bad_events if has_events else None,
                    overlap_counts=rng.integers(0, 4, length).astype(np.uint8)
                    if has_overlap
                    else None,
                ),
            )
        )
    return rollouts, 3 if has_overlap else None


SHARES = (
    "truncation_rate",
    "ended_by_student",
    "ended_by_length",
    "overlap",
    "bad_event_rate",
    "exhausted_rate",
    "unreliable_share",
    "repetition_rate",
    "repetition_rate_p90",
)


@settings(max_examples=200, deadline=None)
@given(steps())
def test_every_metric_of_any_step_is_finite_and_shares_are_shares(
    step: tuple[list[Rollout], int | None],
) -> None:
    rollouts, overlap_k = step
    metrics = rollout_report(rollouts, overlap_k=overlap_k)
    report = replace(
        step_report(),
        generation=metrics,
        profile=step_profile(rollouts, overlap_k=overlap_k),
    )
    values = report.values()
    assert all(math.isfinite(value) for value in values.values())
    assert all(0.0 <= values[name] <= 1.0 for name in SHARES if name in values)
    assert metrics.effective_length_p50 <= metrics.effective_length_p90
    assert metrics.effective_length_p90 <= metrics.length_p90
    assert report.profile is not None
    json.dumps(asdict(report.profile), allow_nan=False)
    warnings_of(report, first=report)


def test_what_a_step_says_nothing_about_is_left_out() -> None:
    nothing = replace(random_rollout(np.random.default_rng(0), num_response=0), drift=None)
    metrics = rollout_report([nothing], overlap_k=3)
    assert metrics.effective_length_mean == 0.0
    absent = {"overlap", "bad_event_rate", "unreliable_share", "exhausted_rate"}
    written = replace(step_report(reverse_kl=None), generation=metrics).values()
    assert not absent & written.keys()
    assert not any(name.startswith("reverse_kl") for name in written)


# Warnings

UNHEALTHY = [
    ("support_mass", {"student_mass_at_teacher_topk": 0.49}, "0.49 (0.95 in the first step)"),
    ("bad_events", {"bad_event_rate": 0.91}, "91% of the tokens are bad events"),
    ("effective_length", {"effective_length_p50": 9.0}, "within 9 tokens, 60% of them"),
    ("unreliable", {"unreliable_share": 0.81}, "81% of the tokens come after R reached 0"),
    ("repetition", {"repetition_rate": 0.31}, "31% of the tokens continue a loop"),
    ("no_tokens", {"loss_tokens": 0.0}, "no token counted"),
    ("weights", {"weight_min": 0.1, "weight_max": 11.0}, "from 0.1 to 11"),
    ("weights", {"weight_min": 0.0, "weight_max": 20.5}, "from 0 to 20"),
    ("weights", {"weight_min": 0.0, "weight_max": 0.0, "weight_mean": 0.0}, "every weight is 0"),
    ("unscored", {"unscored_rollouts": 2}, "2 rollouts are lost, 0 are"),
    ("unscored", {"partly_scored_rollouts": 3}, "0 rollouts are lost, 3 are"),
]
FINE = [
    {},
    {"student_mass_at_teacher_topk": 0.5},
    {"bad_event_rate": 0.9},
    {"effective_length_p50": 10.0},
    {"effective_length_p50": 3.0, "exhausted_rate": 0.4},  # short answers
    {"unreliable_share": 0.8},
    {"repetition_rate": 0.3},
    {"weight_max": 20.0},
    {"weight_min": 0.0},
]


@pytest.mark.parametrize(("kind", "changes", "shown"), UNHEALTHY, ids=lambda value: str(value)[:40])
def test_each_threshold_gives_its_warning_and_no_other(
    kind: str, changes: dict[str, float], shown: str
) -> None:
    (alarm,) = warnings_of(step_report(**changes), first=step_report())
    assert alarm.kind == kind
    assert shown in alarm.message


@pytest.mark.parametrize("changes", FINE, ids=str)
def test_at_its_threshold_a_metric_is_still_fine(changes: dict[str, float]) -> None:
    assert warnings_of(step_report(**changes), first=step_report()) == []


def test_mass_that_halved_since_the_first_step_warns() -> None:
    now = step_report(student_mass_at_teacher_topk=0.6)
    assert warnings_of(now, first=step_report()) == []
    (alarm,) = warnings_of(now, first=step_report(student_mass_at_teacher_topk=1.25))
    assert alarm.kind == "support_mass"
    assert warnings_of(now, first=step_report(student_mass_at_teacher_topk=None)) == []
    assert warnings_of(now, first=None) == []


def test_mismatched_tokens_are_named_by_their_text() -> None:
    (found,) = mismatched_tokens(mismatching())
    report = replace(step_report(), profile=profile_of_one_token(*[found] * 7))
    (alarm,) = warnings_of(report, first=step_report(), decode={7: "<|im_end|>"}.__getitem__)
    assert alarm.kind == "mismatched_tokens"
    assert "'<|im_end|>' (id 7, 2 rollouts, teacher -39.0, student -0.38 nats)" in alarm.message
    assert alarm.message.count("im_end") == 5
    assert "and 2 more" in alarm.message
    assert "special_tokens.tokens" in alarm.message


def test_a_step_that_says_little_gives_no_warning() -> None:
    little = replace(step_report(), learning=None, generation=None)
    assert warnings_of(little, first=None) == []
    absent = dict.fromkeys(
        ("bad_event_rate", "exhausted_rate", "unreliable_share", "weight_min", "weight_max")
    )
    assert warnings_of(step_report(**absent), first=None) == []


SPREAD_BEFORE = {
    "behavior_entropy": 2.16,
    "behavior_mass_at_student_topk": 0.93,
    "teacher_mass_at_teacher_topk": 0.976,
    "overlap": 0.49,
}
"""A language model of 24 of 30 layers against the whole one."""


@pytest.mark.parametrize(
    ("changes", "spreads"),
    [
        # student_topk_reverse_kl after ten steps, and after five; local_support_matching;
        # truncated_reverse_kl with a tail.
        ({"behavior_entropy": 2.35, "behavior_mass_at_student_topk": 0.87, "overlap": 0.58}, True),
        ({"behavior_entropy": 2.10, "behavior_mass_at_student_topk": 0.91, "overlap": 0.57}, False),
        ({"behavior_entropy": 1.95, "behavior_mass_at_student_topk": 0.94, "overlap": 0.60}, False),
        ({"behavior_entropy": 1.50, "behavior_mass_at_student_topk": 0.96, "overlap": 0.59}, False),
        # The teacher's own mass fell as much: other prompts; the overlap fell: plain drift.
        (
            {
                "behavior_entropy": 2.35,
                "behavior_mass_at_student_topk": 0.87,
                "teacher_mass_at_teacher_topk": 0.916,
                "overlap": 0.58,
            },
            False,
        ),
        ({"behavior_entropy": 2.35, "behavior_mass_at_student_topk": 0.87, "overlap": 0.45}, False),
        ({"behavior_entropy": 2.35, "behavior_mass_at_student_topk": None, "overlap": 0.58}, False),
    ],
)
def test_a_student_that_spreads_out_while_overlap_improves_is_warned_of(
    changes: dict[str, float | None], spreads: bool
) -> None:
    first = step_report(1, **SPREAD_BEFORE)
    assert warnings_of(first, first=first) == []
    found = warnings_of(step_report(10, **(SPREAD_BEFORE | changes)), first=first)
    assert [alarm.kind for alarm in found] == ["spreading"] * spreads
    if spreads:
        assert "2.16 to 2.35 nats and its own top-k lost 0.06 of mass" in found[0].message


def test_entropy_of_a_step_is_that_of_the_tokens_that_count() -> None:
    made = responded([5, 6, 7], behavior=[-1.0, -3.0, -9.0], mask=[1, 1, 0])
    assert rollout_report([made], overlap_k=4).behavior_entropy == 2.0
    masked = responded([5], behavior=[-1.0], mask=[0])
    assert rollout_report([masked], overlap_k=4).behavior_entropy is None


def test_an_alarm_does_not_advise_what_is_there_already() -> None:
    with_tail = Method(loss_has_tail=True, weights=("position_window", "entropy_top"))
    low = step_report(student_mass_at_teacher_topk=0.4)
    (alarm,) = warnings_of(low, first=step_report(), method=with_tail)
    assert "use a loss with a tail" not in alarm.message
    assert "raise optim.learning_rate" in alarm.message
    nothing = step_report(weight_min=0.0, weight_max=0.0, weight_mean=0.0)
    (alarm,) = warnings_of(nothing, first=step_report(), method=with_tail)
    assert "w_base" not in alarm.message
    assert "widen weights.position_window, or raise weights.entropy_top.ratio" in alarm.message
    (alarm,) = warnings_of(nothing, first=step_report(), method=Method(weights=("prune",)))
    assert "raise weights.prune.w_base" in alarm.message
