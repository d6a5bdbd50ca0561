"""Two trainers on one teacher: what runs come to. Starts them only in the long round.

Run: python -m pytest tests/benchmarks/test_shared_teacher.py
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.measuring import Measured, Sample, wide_console
from benchmarks.shared_teacher import SEEDS, comparison, main, outcome, parser
from tests.rounds import in_the_long_round


def arm(seconds: float, **figures: list[float]) -> Measured:
    """A sample for each value of a figure."""
    count = max(map(len, figures.values()))
    return Measured(
        samples=[
            Sample(seconds=seconds, figures={name: of[i] for name, of in figures.items()})
            for i in range(count)
        ]
    )


def arms() -> dict[str, Measured]:
    first, second = (
        {f"heldout_reverse_kl_seed{seed}": kl, f"accuracy_seed{seed}": [0.5, 0.5]}
        for seed, kl in zip(SEEDS, ([0.10, 0.12], [0.14, 0.18]), strict=True)
    )
    beside = {"heldout_reverse_kl_seed1": [0.12, 0.14], "heldout_reverse_kl_seed2": [0.15, 0.17]}
    return {
        "alone_seed1": arm(10.0, **first),
        "alone_seed2": arm(12.0, **second),
        "together": arm(33.0, **{**first, **second, **beside}),
    }


def test_a_seeds_figures_beside_others_are_held_against_the_spread_of_all_runs_alone() -> None:
    found = comparison(arms(), SEEDS)
    assert found["heldout_reverse_kl_spread_alone"] == pytest.approx(0.08)
    assert found["heldout_reverse_kl_gap_seed1"] == pytest.approx(0.02)
    assert found["heldout_reverse_kl_gap_seed2"] == pytest.approx(0.0)
    assert found["accuracy_gap_seed1"] == 0.0
    assert found["seconds_together_over_one_by_one"] == pytest.approx(1.5)


def test_nothing_is_compared_where_a_trainer_failed() -> None:
    failed = arms()
    failed["together"].error = "exit code 1"
    assert set(comparison(failed, SEEDS).values()) == {None}


def test_a_run_is_read_from_what_it_wrote(tmp_path: Path) -> None:
    step = {"kind": "step", "seconds_generate": 1.0, "seconds_learn": 2.0, "unscored_rollouts": 0}
    evaluation = {"kind": "eval", "heldout_reverse_kl_se": 0.01, "accuracy": 0.3}
    lines = [
        evaluation | {"step": 0, "heldout_reverse_kl": 0.4, "heldout_unscored": 0},
        step | {"step": 1},
        step | {"step": 2, "seconds_learn": 4.0, "unscored_rollouts": 1},
        evaluation | {"step": 2, "heldout_reverse_kl": 0.2, "heldout_unscored": 2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert outcome(tmp_path) == {
        "steps": 2,
        "unscored": 3,
        "step_s": 4.0,
        "heldout_reverse_kl_before": 0.4,
        "heldout_reverse_kl": 0.2,
        "heldout_reverse_kl_se": 0.01,
        "accuracy": 0.3,
    }


@in_the_long_round
@pytest.mark.vllm
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_two_small_runs_at_once(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = parser().parse_args(["--quick", "--json", str(path)])
    assert asyncio.run(main(arguments, wide_console())) == 0
    found = json.loads(path.read_text())
    figures = found["arms"]["together"]["figures"]
    assert figures["steps"]["values"] == [4]
    assert figures["failed"]["values"] == [0]
    assert figures["answered"]["values"][0] > 0
