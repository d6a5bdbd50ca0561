"""What analysis costs: what the figures come to. Measures only in the long round.

Run: python -m pytest tests/benchmarks/test_looking.py
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.analysis import FORMS, LARGE, main, named_ratios, parser
from benchmarks.analysis_reader import body_of, one_text
from benchmarks.measuring import Measured, Sample, wide_console
from tests.rounds import in_the_long_round


def arm(*seconds: float, **figures: float) -> Measured:
    return Measured(samples=[Sample(seconds=value, figures=figures) for value in seconds])


def test_ratios_are_of_analysis_over_score_and_of_the_trainers_speed() -> None:
    arms = {
        "playground_score": arm(1.0, 2.0, 3.0, cpu_s=0.5),
        **{f"playground_{form}": arm(3.0, cpu_s=1.0) for form in FORMS},
        f"{LARGE}_score": arm(10.0),
        f"{LARGE}_analyze": arm(11.0),
        "trainer_alone": arm(2.0),
        "trainer_beside_analyze": arm(2.5),
        "trainer_beside_score": Measured(error="gone"),
    }
    assert named_ratios(arms) == {
        **{f"{form}_over_score_playground": 1.5 for form in FORMS},
        **{f"{form}_over_score_playground_cpu": 2.0 for form in FORMS},
        f"analyze_over_score_{LARGE}": 1.1,
        f"analyze_over_score_{LARGE}_cpu": None,
        "trainer_speed_beside_analyze": 0.8,
        "trainer_speed_beside_score": None,
    }


def test_a_reader_asks_both_ways_for_the_same_tokens() -> None:
    text = one_text(20, vocab_size=64, k=10)
    analysis, score = (body_of(text, path, 10) for path in ("/v1/analyze", "/v1/score"))
    assert score == analysis | {"encoding": "base64"}
    assert len(analysis["response_ids"]) == len(analysis["candidate_ids"]) == 20


@in_the_long_round
@pytest.mark.timeout(900)
def test_the_benchmark_measures_the_playground(tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"
    arguments = parser().parse_args(["--quick", "--repeats", "1", "--json", str(path)])
    assert asyncio.run(main(arguments, wide_console())) == 0
    found = json.loads(path.read_text())
    assert all(found["ratios"].values())
    assert found["arms"]["playground_analyze"]["figures"]["bytes_per_token"]["median"] < 649
