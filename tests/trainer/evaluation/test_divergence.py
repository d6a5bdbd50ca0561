"""The held-out estimates against exact divergences over the whole vocabulary.

Run: python -m pytest tests/trainer/evaluation/test_divergence.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from student_trainer.evaluation.divergence import (
    Floats,
    _least_outside,
    forward_kl,
    mean_over_tokens,
    reverse_kl,
    sampled_reverse_kl,
)
from student_trainer.evaluation.heldout import heldout_report
from student_trainer.records import Finish, Rollout
from tests.trainer.made_rollouts import log_softmax, random_rollout

V = 40
SEEDS = range(4)


def two_policies(seed: int, scale: float = 2.0) -> tuple[Floats, Floats]:
    """Log-probs [V] of a student and a teacher at one prefix, as the wire has them."""
    rng = np.random.default_rng(seed)
    q, p = (log_softmax(scale * rng.standard_normal(V)) for _ in range(2))
    return q.astype(np.float32).astype(np.float64), p.astype(np.float32).astype(np.float64)


def every_token(q: Floats, p: Floats, num_topk: int, teacher_k: int = 4) -> Rollout:
    """A response that holds each token of the vocabulary once, all at the same prefix."""
    made = random_rollout(np.random.default_rng(0), num_response=V, j=num_topk)
    top = np.argsort(-q)[:num_topk].astype(np.int32)
    teacher_top = np.argsort(-p)[:teacher_k].astype(np.int32)
    return replace(
        made,
        response_ids=np.arange(V, dtype=np.int32),
        behavior_logprobs=q.astype(np.float32),
        student_topk_ids=np.tile(top, (V, 1)),
        student_topk_logprobs=np.tile(q[top].astype(np.float32), (V, 1)),
        teacher=replace(
            made.teacher,
            topk_ids=np.tile(teacher_top, (V, 1)),
            topk_logprobs=np.tile(p[teacher_top].astype(np.float32), (V, 1)),
            token_logprobs=p.astype(np.float32),
            candidate_logprobs=np.tile(p[top].astype(np.float32), (V, 1)) if num_topk else None,
        ),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_topk", [0, 1, 5, V])
def test_estimates_of_the_reverse_kl_are_right_in_expectation(seed: int, num_topk: int) -> None:
    q, p = two_policies(seed)
    exact = float((np.exp(q) * (q - p)).sum())
    rollout = every_token(q, p, num_topk)
    for estimate in (sampled_reverse_kl, reverse_kl):
        # 1e-6: the log-probs are float32, their probabilities add up to 1 that well.
        assert float((np.exp(q) * estimate(rollout)).sum()) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_more_of_the_top_k_leaves_less_to_chance(seed: int) -> None:
    q, p = two_policies(seed)

    def variance(num_topk: int) -> float:
        values = reverse_kl(every_token(q, p, num_topk))
        mean = float((np.exp(q) * values).sum())
        return float((np.exp(q) * (values - mean) ** 2).sum())

    assert variance(0) > variance(5) > variance(20) > variance(V) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_forward_kl_is_a_lower_bound_that_grows_with_either_support(seed: int) -> None:
    q, p = two_policies(seed)
    exact = float((np.exp(p) * (p - q)).sum())
    bounds = np.array(
        [[forward_kl(every_token(q, p, j, k))[0] for k in (1, 4, 16, V)] for j in (1, 5, 20, V)]
    )
    assert (np.diff(bounds, axis=0) >= -1e-6).all()
    assert (np.diff(bounds, axis=1) >= -1e-6).all()
    assert (bounds <= exact + 1e-6).all()
    assert (bounds > 0.0).all()
    assert (bounds[:, 2] > bounds[:, 0]).any()
    assert bounds[-1] == pytest.approx(np.full(4, exact), abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_the_least_outside_is_that_of_no_other_division(seed: int) -> None:
    """Against random divisions of what is left among tokens below the cap and the rest."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(5)) * 0.6
    rest_q, cap = 0.4, 0.4 * rng.uniform(0.1, 0.9)
    least = float(
        _least_outside(p[None, :4], np.array([0.6]), np.array([rest_q]), np.array([cap]))[0]
    )
    for _ in range(2000):
        q = rng.dirichlet(rng.uniform(0.1, 5, 5)) * rest_q
        if (q[:4] <= cap).all():
            assert (p * np.log(p / q)).sum() >= least - 1e-9
    near = np.minimum(p[:4] * rest_q / 0.6, cap)
    q = np.append(near, rest_q - near.sum())
    assert (p * np.log(p / q)).sum() >= least - 1e-9


def test_policies_that_are_one_have_no_divergence() -> None:
    q, _ = two_policies(0)
    rollout = every_token(q, q, 5)
    for estimate in (sampled_reverse_kl, reverse_kl, forward_kl):
        assert np.abs(estimate(rollout)).max() < 1e-6


def test_candidates_without_scores_are_refused() -> None:
    q, p = two_policies(0)
    made = every_token(q, p, 3)
    without = replace(made, teacher=replace(made.teacher, candidate_logprobs=None))
    with pytest.raises(ValueError, match="no teacher log-probs at its candidates"):
        reverse_kl(without)


def test_mean_and_error_of_a_worked_example() -> None:
    """Prompts a: 1, 3 and 2 (two responses), b: 6: mean 12 / 4, residuals -3 and 3."""
    values = [np.array([1.0, 3.0]), np.array([6.0]), np.array([2.0])]
    estimate = mean_over_tokens(values, ["a", "b", "a"])
    assert estimate is not None
    assert estimate.mean == 3.0
    assert estimate.standard_error == pytest.approx(np.sqrt(2 / 1 * (9 + 9)) / 4)
    assert mean_over_tokens([np.array([1.0])], ["a"]).standard_error is None  # type: ignore[union-attr]
    assert mean_over_tokens([np.array([])], ["a"]) is None


def test_the_error_is_that_of_repeated_evaluations() -> None:
    """Tokens of a prompt share an offset; independent tokens would give a third of the error."""
    rng = np.random.default_rng(0)

    def evaluation() -> tuple[float, float]:
        lengths = rng.integers(5, 30, 60)
        values = [rng.normal(rng.normal(0, 1), 1, n) for n in lengths]
        made = mean_over_tokens(values, list(range(60)))
        assert made is not None
        assert made.standard_error is not None
        return made.mean, made.standard_error

    means, errors = zip(*(evaluation() for _ in range(300)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_report_counts_what_the_teacher_scored() -> None:
    rng = np.random.default_rng(1)
    whole = [random_rollout(rng, num_prompt=n, num_response=20, masked=n) for n in (1, 2, 3)]
    cut = replace(whole[0], finish=Finish.UNSCORED)
    report = heldout_report([*whole, cut, None], overlap_k=None)
    assert (report.responses, report.unscored, report.tokens) == (3, 2, 60 - 6)
    assert report.length == 20.0
    assert report.end_rate == 1.0
    counted = [rollout.teacher.token_logprobs[rollout.mask] for rollout in whole]
    assert report.teacher_logprob == pytest.approx(float(np.concatenate(counted).mean()))
    assert report.overlap is None
    assert report.overlap_by_band is None
    assert heldout_report([None, cut], overlap_k=None).reverse_kl is None
