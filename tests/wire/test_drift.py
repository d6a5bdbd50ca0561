"""The drift rule equals the paper's, and fast forms equal slow ones. Run: pytest -k drift"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from teacher_wire import drift
from teacher_wire.drift_metrics import (
    DriftMetric,
    OverlapRatio,
    TeacherTopPAccept,
    outside_nucleus,
    overlap_counts,
    slow_outside_nucleus,
    slow_overlap_counts,
)
from teacher_wire.records import DriftPolicy, DriftState, ModelRows, Verdict

PROPERTY = settings(max_examples=80, deadline=None)


def distinct_ids(rng: np.random.Generator, n: int, k: int, vocab: int) -> NDArray[np.int32]:
    return np.array([rng.permutation(vocab)[:k] for _ in range(n)], np.int32).reshape(n, k)


def test_golden_reliability_of_the_paper() -> None:
    overlaps = np.array([1, 0.75, 0.5, 0.75, 0.5, 0.25, 1, 0.5, 0.75])
    policy = DriftPolicy(metric=OverlapRatio(k=4, threshold=0.7), w_drop=0.25)
    counts = (overlaps * 4).astype(np.uint8)
    bad = drift.bad_events(
        policy,
        token_ids=np.zeros(9, np.int32),
        rows=ModelRows(
            topk_ids=np.zeros((9, 4), np.int32),
            topk_logprobs=np.zeros((9, 4), np.float32),
            token_logprobs=np.zeros(9, np.float32),
        ),
        overlaps=counts,
        event_mask=None,
    )
    expected = [1, 1, 0.75, 0.75, 0.5, 0.25, 0.25, 0, 0]
    assert drift.reliability(0.25, bad).tolist() == expected
    assert drift.slow_reliability(0.25, bad).tolist() == expected
    state, verdict, keep = drift.advance(policy, DriftState(), bad)
    assert state == DriftState(num_tokens=9, num_bad_events=4, exhausted_at=8)
    assert (verdict, keep) == (Verdict.TRUNCATE, 8)


@pytest.mark.parametrize(
    ("w_drop", "budget"),
    [(0.01, 100), (0.3, 4), (0.25, 4), (0.1, 10), (1.0, 1), (1 / 3, 3), (1 / 49, 49), (0.07, 15)],
)
def test_budget_is_exact(w_drop: float, budget: int) -> None:
    policy = DriftPolicy(w_drop=w_drop)
    before, verdict, _ = drift.advance(policy, DriftState(), np.ones(budget - 1, bool))
    assert before.exhausted_at is None
    assert verdict is Verdict.CONTINUE
    after, verdict, keep = drift.advance(policy, before, np.ones(1, bool))
    assert (verdict, keep, after.exhausted_at) == (Verdict.TRUNCATE, budget, budget)
    reliable = drift.reliability(w_drop, np.ones(budget, bool))
    assert reliable[-1] == 0.0
    assert (reliable[:-1] > 0).all()


def test_every_inverse_integer_exhausts_at_that_integer() -> None:
    assert [drift.bad_event_budget(1 / n) for n in range(1, 2000)] == list(range(1, 2000))


@pytest.mark.parametrize(
    ("threshold", "k", "count"), [(0.7, 16, 12), (0.6, 5, 3), (0.7, 10, 7), (1.0, 8, 8)]
)
def test_threshold_is_exclusive_at_exact_fractions(threshold: float, k: int, count: int) -> None:
    assert OverlapRatio(threshold=threshold, k=k).min_count == count


@PROPERTY
@given(
    n=st.integers(0, 6), k=st.integers(1, 12), extra=st.integers(0, 12), seed=st.integers(0, 2**32)
)
def test_overlap_laws(n: int, k: int, extra: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = distinct_ids(rng, n, k, k + extra), distinct_ids(rng, n, k, k + extra)
    counts = overlap_counts(left, right)
    np.testing.assert_array_equal(counts, slow_overlap_counts(left, right))
    np.testing.assert_array_equal(counts, overlap_counts(right, left))
    shuffled = rng.permuted(left, axis=1)
    np.testing.assert_array_equal(counts, overlap_counts(shuffled, right))
    assert (overlap_counts(left, shuffled) == k).all()
    assert (counts <= k).all()


def test_long_lists_of_rows_are_compared_in_blocks() -> None:
    rng = np.random.default_rng(0)
    left, right = distinct_ids(rng, 1100, 4, 8), distinct_ids(rng, 1100, 4, 8)
    fast, slow = overlap_counts(left, right), slow_overlap_counts(left, right)
    np.testing.assert_array_equal(fast, slow)


def test_repeated_candidates_count_once() -> None:
    student = np.array([[7, 7, 7]], np.int32)
    teacher = np.array([[7, 8, 9]], np.int32)
    assert overlap_counts(student, teacher).tolist() == [1]


@PROPERTY
@given(
    n=st.integers(1, 6),
    k=st.integers(1, 10),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
def test_nucleus_equals_its_definition(n: int, k: int, top_p: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    topk_ids = distinct_ids(rng, n, k, 12)
    mass = -np.sort(-rng.dirichlet(np.full(k + 1, 0.5), n)[:, :k], axis=1)
    logprobs = np.log(mass + 1e-12).astype(np.float32)
    tokens = rng.integers(0, 12, n).astype(np.int32)
    fast = outside_nucleus(tokens, topk_ids, logprobs, top_p)
    np.testing.assert_array_equal(fast, slow_outside_nucleus(tokens, topk_ids, logprobs, top_p))


def test_nucleus_is_the_smallest_prefix_and_the_whole_top_k_when_never_reached() -> None:
    ids = np.array([[1, 2, 3]], np.int32)
    logprobs = np.log(np.array([[0.5, 0.25, 0.125]], np.float32))

    def outside(token: int, top_p: float) -> bool:
        tokens = np.array([token], np.int32)
        return bool(outside_nucleus(tokens, ids, logprobs, top_p)[0])

    assert [outside(token, 0.4999) for token in (1, 2, 3, 4)] == [False, True, True, True]
    assert [outside(token, 0.51) for token in (1, 2, 3, 4)] == [False, False, True, True]
    assert [outside(token, 0.99) for token in (1, 2, 3, 4)] == [False, False, False, True]


@pytest.mark.parametrize("metric", [OverlapRatio(k=2, threshold=1.0), TeacherTopPAccept(k=2)])
def test_a_masked_position_raises_no_event(metric: DriftMetric) -> None:
    mask = np.array([True, False, True])
    bad = drift.bad_events(
        DriftPolicy(metric=metric),
        token_ids=np.full(3, 9, np.int32),
        rows=ModelRows(
            topk_ids=np.tile(np.array([1, 2], np.int32), (3, 1)),
            topk_logprobs=np.log(np.full((3, 2), 0.4, np.float32)),
            token_logprobs=np.zeros(3, np.float32),
        ),
        overlaps=np.zeros(3, np.uint8),
        event_mask=mask,
    )
    np.testing.assert_array_equal(bad, mask)


@PROPERTY
@given(
    bad=st.lists(st.booleans(), max_size=40),
    cut=st.integers(0, 40),
    w_drop=st.sampled_from([0.01, 0.1, 0.25, 0.3, 1.0]),
    stop=st.booleans(),
)
def test_pieces_advance_like_the_whole(
    bad: list[bool], cut: int, w_drop: float, stop: bool
) -> None:
    policy = DriftPolicy(w_drop=w_drop, stop_in_flight=stop)
    events = np.array(bad, bool)
    whole = drift.advance(policy, DriftState(), events)
    state, _, _ = drift.advance(policy, DriftState(), events[:cut])
    assert drift.advance(policy, state, events[cut:]) == whole
    reliable = drift.reliability(w_drop, events)
    np.testing.assert_allclose(reliable, drift.slow_reliability(w_drop, events), atol=1e-12)
    assert (np.diff(reliable) <= 0).all()
    exhausted = np.flatnonzero(reliable == 0)
    assert whole[0].exhausted_at == (exhausted[0] + 1 if len(exhausted) else None)


def test_the_verdict_is_repeated_and_observing_never_stops() -> None:
    spent = DriftState(num_tokens=5, num_bad_events=2, exhausted_at=4)
    quiet = np.zeros(3, bool)
    state, verdict, keep = drift.advance(DriftPolicy(w_drop=0.5), spent, quiet)
    assert (state.num_tokens, verdict, keep) == (8, Verdict.TRUNCATE, 4)
    observing = DriftPolicy(w_drop=0.5, stop_in_flight=False)
    state, verdict, keep = drift.advance(observing, DriftState(), np.ones(3, bool))
    assert (state.exhausted_at, verdict, keep) == (2, Verdict.CONTINUE, None)
