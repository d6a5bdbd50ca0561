"""Budgets against their published arithmetic: pytest tests/trainer/rollouts/test_budget.py"""

import json
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.diagnostics.step import lengths_in_budget
from student_trainer.records import Finish
from student_trainer.rollouts.budget import (
    FixedBudget,
    LengthBudget,
    ProgressiveBudget,
    PruneBudget,
    QuantileBudget,
)
from student_trainer.settings.budget import (
    FixedBudgetSettings,
    ProgressiveBudgetSettings,
    PruneBudgetSettings,
    QuantileBudgetSettings,
)
from tests.trainer.made_rollouts import random_rollout


def test_one_hit_in_ten_grows_the_budget_at_once() -> None:
    budget = PruneBudget(PruneBudgetSettings(initial=2048))
    budget.update([300] * 9 + [1950])
    assert budget.max_tokens == 2148


def test_the_hit_boundary_is_inclusive() -> None:
    budget = PruneBudget(PruneBudgetSettings(initial=2048))
    budget.update([300] * 9 + [1947])
    assert budget.max_tokens == 2048
    budget.update([300] * 9 + [1948])
    assert budget.max_tokens == 2148


def test_the_third_low_step_in_a_row_shrinks_the_budget() -> None:
    budget = PruneBudget(PruneBudgetSettings(initial=2048))
    budget.load({"max_tokens": 2048, "num_low": 2})
    budget.update([300] * 10)
    assert budget.state() == {"max_tokens": 1948, "num_low": 0}


def test_share_of_hits_is_what_there_is_to_log() -> None:
    assert PruneBudget(PruneBudgetSettings(initial=2048)).update([300, 1948, 2048, 0]) == 0.5
    assert FixedBudget(FixedBudgetSettings(max_tokens=10)).update([10]) is None
    assert (
        QuantileBudget(QuantileBudgetSettings(initial=10, minimum=1, maximum=20)).update([10])
        is None
    )
    assert (
        ProgressiveBudget(
            ProgressiveBudgetSettings(initial=1, maximum=2, increment=1, every_steps=2)
        ).update([10])
        is None
    )


def test_low_steps_survive_a_checkpoint() -> None:
    stopped, resumed = (
        PruneBudget(PruneBudgetSettings(initial=2048)),
        PruneBudget(PruneBudgetSettings(initial=1024)),
    )
    stopped.update([300])
    stopped.update([300])
    resumed.load(stopped.state())
    resumed.update([300])
    assert resumed.max_tokens == 1948


def test_a_hit_forgives_low_steps() -> None:
    budget = PruneBudget(PruneBudgetSettings(initial=2048))
    lengths = []
    for effective in ([300], [300], [2048], [300], [300], [300]):
        budget.update(effective)
        lengths.append(budget.max_tokens)
    assert lengths == [2048, 2048, 2148, 2148, 2148, 2048]


@pytest.mark.parametrize(("boundary", "expected"), [("code", 1024), ("paper", 1124)])
def test_paper_and_code_differ_at_the_minimum(
    boundary: Literal["paper", "code"], expected: int
) -> None:
    budget = PruneBudget(PruneBudgetSettings(initial=1024, boundary=boundary))
    budget.update([1000] * 10)
    assert budget.max_tokens == expected


def test_the_budget_stops_at_its_bounds() -> None:
    budget = PruneBudget(PruneBudgetSettings(initial=1080, minimum=1024, maximum=1150, patience=1))
    budget.update([1080])
    assert budget.max_tokens == 1150
    budget.update([0])
    budget.update([0])
    assert budget.max_tokens == 1024


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(0, 700), min_size=1, max_size=5), max_size=20),
    stop=st.integers(0, 20),
)
def test_a_resumed_budget_continues_as_if_never_stopped(steps: list[list[int]], stop: int) -> None:
    def make() -> list[LengthBudget]:
        return [
            PruneBudget(PruneBudgetSettings(initial=400, minimum=200, maximum=600, patience=2)),
            QuantileBudget(QuantileBudgetSettings(initial=400, minimum=200, maximum=600)),
            ProgressiveBudget(
                ProgressiveBudgetSettings(initial=100, maximum=450, increment=100, every_steps=3)
            ),
            FixedBudget(FixedBudgetSettings(max_tokens=512)),
        ]

    for straight, first, resumed in zip(make(), make(), make(), strict=True):
        for effective in steps:
            straight.update(effective)
            assert 100 <= straight.max_tokens <= 600
        for effective in steps[:stop]:
            first.update(effective)
        resumed.load(json.loads(json.dumps(first.state())))
        for effective in steps[stop:]:
            resumed.update(effective)
        assert resumed.max_tokens == straight.max_tokens


def test_progressive_grows_in_stairs_up_to_its_maximum() -> None:
    budget = ProgressiveBudget(
        ProgressiveBudgetSettings(initial=100, maximum=250, increment=100, every_steps=2)
    )
    lengths = []
    for _ in range(6):
        lengths.append(budget.max_tokens)
        budget.update([])
    assert lengths == [100, 100, 200, 200, 250, 250]


def test_quantile_moves_half_way_to_the_quantile_plus_margin() -> None:
    budget = QuantileBudget(
        QuantileBudgetSettings(initial=1000, minimum=200, maximum=2000, margin=100)
    )
    effective = list(range(0, 1100, 100))  # nine tenths of it: 900
    budget.update(effective)
    assert budget.max_tokens == 1000
    budget.update([300])
    assert budget.max_tokens == 700
    for _ in range(30):
        budget.update([0])
    assert budget.max_tokens == 200


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"max_tokens": 2048},
        {"max_tokens": 2048, "num_low": 3},
        {"max_tokens": 10, "num_low": 0},
        {"max_tokens": 2048, "num_low": 0, "step": 1},
    ],
)
def test_a_foreign_state_is_refused(state: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"state keys|must be in"):
        PruneBudget(PruneBudgetSettings(initial=2048)).load(state)


@pytest.mark.parametrize(
    "budget",
    [
        PruneBudget(PruneBudgetSettings(initial=2048)),
        QuantileBudget(QuantileBudgetSettings(initial=10, minimum=1, maximum=20)),
    ],
)
def test_a_step_that_says_nothing_of_lengths_changes_nothing(budget: LengthBudget) -> None:
    before = budget.state()
    assert budget.update([]) is None
    assert budget.state() == before


def test_rollouts_that_the_teacher_left_do_not_shorten_the_budget() -> None:
    """Ten of 2,048 cut at 300 by an outage: 1,224 after one step, were they counted."""
    rng = np.random.default_rng(0)
    cut = [
        replace(random_rollout(rng, num_response=30), finish=Finish.UNSCORED, drift=None)
        for _ in range(10)
    ]
    whole = replace(random_rollout(rng, num_response=80), finish=Finish.STOP, drift=None)
    constants = QuantileBudgetSettings(initial=80, minimum=1, maximum=80, margin=0)
    for rollouts in (cut, [*cut, whole]):
        budget = QuantileBudget(constants)
        budget.update(lengths_in_budget(rollouts))
        assert budget.max_tokens == 80


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="minimum <= initial"):
        PruneBudgetSettings(initial=512)
    with pytest.raises(ValueError, match="hit_ratio"):
        PruneBudgetSettings(initial=2048, hit_ratio=0.0)
    with pytest.raises(ValueError, match="patience"):
        PruneBudgetSettings(initial=2048, patience=0)
    with pytest.raises(ValueError, match="boundary"):
        PruneBudgetSettings(initial=2048, boundary="text")
    with pytest.raises(ValueError, match="max_tokens"):
        FixedBudgetSettings(max_tokens=0)
    with pytest.raises(ValueError, match="every_steps"):
        ProgressiveBudgetSettings(initial=1, maximum=2, increment=1, every_steps=0)
    with pytest.raises(ValueError, match="quantile"):
        QuantileBudgetSettings(initial=10, minimum=1, maximum=20, quantile=1.5)
