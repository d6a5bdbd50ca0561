"""The study's book-keeping: what is run again, what a curve says, what a claim's answer is.

Run: python -m pytest tests/benchmarks/test_study.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.study import document
from benchmarks.study.__main__ import _turned
from benchmarks.study.arms import ARMS, QUICK, Arm, by_name
from benchmarks.study.claims import CLAIMS, findings
from benchmarks.study.results import REFERENCE, Results, cost_to_reach, ratios, spread
from benchmarks.study.workbench import measured, settings
from student_trainer.diagnostics.step_report import PHASES, EvalReport
from student_trainer.recording.recorder import Recorder
from student_trainer.recording.terminal import Bars
from tests.trainer.made_reports import profile_of_one_token, step_report

BY_NAME = {arm.name: arm for arm in ARMS}


def record(seed: int, accuracies: list[float], **figures: Any) -> dict[str, Any]:
    """A run evaluated every 2 steps; 10 tokens and 1 s a step unless told."""
    curve = [
        {"step": 2 * i, "wall_s": 2.0 * i, "generated_tokens": 20 * i, "accuracy": accuracy}
        for i, accuracy in enumerate(accuracies)
    ]
    last = curve[-1]
    return {
        "seed": seed,
        "error": None,
        "accuracy": last["accuracy"],
        "wall_s": last["wall_s"],
        "generated_tokens": last["generated_tokens"],
        "kept_tokens": last["generated_tokens"],
        "curve": curve,
        "max_tokens": [8] * (len(curve) - 1),
        "overlap_by_band": {"first": None, "last": None},
        **figures,
    }


def filled(tmp_path: Path, **records: list[dict[str, Any]]) -> Results:
    results = Results(tmp_path / "study.json")
    for name, seeds in records.items():
        for one in seeds:
            results.add(BY_NAME[name], one, steps=4)
    return results


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_configuration_that_can_run(arm: Arm, tmp_path: Path) -> None:
    config = settings(arm, 3, steps=5, out=tmp_path, teacher="127.0.0.1:1")
    assert (config.run.seed, config.run.steps) == (3, 5)
    assert arm.pair.student.is_dir()


def test_arms_differ_in_their_changes_and_share_everything_else(tmp_path: Path) -> None:
    """No learner setting but the epochs of the reuse arms; no arm equals another."""
    dumped = {}
    for arm in ARMS:
        config = settings(arm, 0, steps=4, out=tmp_path, teacher="127.0.0.1:1")
        optim = config.optim.model_copy(update={"epochs": 1})
        assert optim == settings(ARMS[0], 0, steps=4, out=tmp_path, teacher="127.0.0.1:1").optim
        assert (config.optim.epochs == 3) == arm.name.startswith("reuse")
        dumped[arm.name] = config.model_dump_json()
    assert len(set(dumped.values())) == len(ARMS)


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="no arm nonsense; there are opd, "):
        by_name(["opd", "nonsense"])
    assert [arm.name for arm in by_name(list(QUICK))] == [a.name for a in ARMS if a.name in QUICK]


def test_a_curve_is_straight_between_evaluations() -> None:
    run = record(0, [0.1, 0.1, 0.5, 0.4, 0.9])
    assert cost_to_reach(run, 0.1, "wall_s") == 0.0
    assert cost_to_reach(run, 0.3, "wall_s") == pytest.approx(3.0)
    assert cost_to_reach(run, 0.5, "generated_tokens") == 40
    assert cost_to_reach(run, 0.65, "generated_tokens") == pytest.approx(70)
    assert cost_to_reach(run, 0.91, "wall_s") is None


def test_ratios_compare_seed_by_seed_and_say_nothing_where_one_never_got_there(
    tmp_path: Path,
) -> None:
    results = filled(
        tmp_path,
        opd=[record(0, [0.0, 0.2, 0.6]), record(1, [0.0, 0.2, 0.4])],  # goal 0.5
        topk_stop=[record(0, [0.0, 1.0]), record(1, [0.0, 0.5])],
        iw=[record(0, [0.0, 1.0]), record(1, [0.0, 0.4])],
    )
    found = ratios(results.arms)
    assert found["topk_stop_tokens_to_opd_accuracy_over_opd_tokens"] == pytest.approx(0.375)
    assert found["iw_wall_to_opd_accuracy_over_opd_wall"] is None
    assert not any(name.startswith("opd_tokens") for name in found)
    assert not any("topk_accuracy" in name for name in found)
    filled(tmp_path, topk=[record(0, [0.0, 0.0, 1.0]), record(1, [0.0, 0.0, 0.5])])
    found = ratios(Results(results.path).arms)
    assert found["topk_stop_wall_to_topk_accuracy_over_topk_wall"] is None  # 0.75, not by seed 1
    assert found["topk_wall_to_opd_accuracy_over_opd_wall"] == pytest.approx(0.875)
    assert json.loads(results.path.read_text())["ratios"] == found


def test_a_run_is_done_once_and_again_when_its_settings_change(tmp_path: Path) -> None:
    arm = BY_NAME["iw"]
    results = filled(tmp_path, iw=[record(1, [0.0, 0.4]), record(0, [0.0, 0.3])])
    again = Results(results.path)
    assert [one["seed"] for one in again.arms["iw"]["seeds"]] == [0, 1]
    assert again.has(arm, 0, steps=4)
    assert not again.has(arm, 2, steps=4)
    assert not again.has(arm, 0, steps=5)
    changed = replace(arm, changes=arm.changes | {"weights.prefix_importance.gamma": 0.25})
    assert not again.has(changed, 0, steps=4)
    again.add(changed, record(0, [0.0, 0.9]), steps=4)
    assert [one["accuracy"] for one in again.arms["iw"]["seeds"]] == [0.9]


def test_every_seed_begins_elsewhere_and_leaves_none_out() -> None:
    orders = [_turned(list(ARMS), seed) for seed in range(3)]
    assert len({order[0].name for order in orders}) == 3
    assert all(sorted(a.name for a in order) == sorted(BY_NAME) for order in orders)


@pytest.mark.parametrize(
    ("arm", "other", "answer"),
    [
        ([0.7, 0.8], [0.6, 0.7], "yes"),
        ([0.7, 0.6], [0.6, 0.7], "not settled (1 of 2 seeds)"),
        ([0.5, 0.6], [0.6, 0.7], "no"),
        ([0.0, 0.0], [0.0, 0.0], "cannot be told: neither learnt anything"),
    ],
)
def test_a_claim_holds_where_every_seed_says_so(
    tmp_path: Path, arm: list[float], other: list[float], answer: str
) -> None:
    results = filled(
        tmp_path,
        iw=[record(i, [0.0, 0.0, value]) for i, value in enumerate(arm)],
        opd=[record(i, [0.0, 0.0, value]) for i, value in enumerate(other)],
    )
    found = {f.claim.says: f for f in findings(results.arms)}
    assert found["and at the end"].answer == answer
    assert found["and at the end"].num_seeds == 2
    assert found["and at the end"].arm_mean == pytest.approx(sum(arm) / 2)


def test_claims_compare_arms_that_exist() -> None:
    assert {c.arm for c in CLAIMS} | {c.other for c in CLAIMS} <= set(BY_NAME)
    assert set(REFERENCE.values()) <= set(BY_NAME)
    assert {arm.pair.name for arm in ARMS} == set(REFERENCE)


def test_a_spread_of_one_seed_has_no_deviation() -> None:
    assert spread([0.5]).deviation is None
    assert spread([0.4, 0.6]).deviation == pytest.approx(0.1414, abs=1e-4)


def test_the_document_is_filled_between_its_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.md"
    path.write_text(
        "before\n<!-- low -->\nold\n<!-- end low -->\nmiddle\n<!-- high -->\n<!-- end high -->\n"
        "<!-- claims -->\n<!-- end claims -->\nafter\n"
    )
    monkeypatch.setattr(document, "DOCUMENT", path)
    failed = record(0, [0.0, 0.25], error="NonFiniteLossError: gone")
    results = filled(tmp_path, opd=[record(0, [0.0, 0.5])], iw=[failed])
    document.write_document(results)
    text = path.read_text()
    assert text.startswith("before\n<!-- low -->\n| arm |")
    assert "old" not in text
    assert "| IW-OPD (1 failed) | 1 | 25.0% | 1.00 | 1.00 | 1.00 | never | never |" in text
    assert "| full OPD, sampled token | 1 | 50.0% | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert text.endswith("<!-- end claims -->\nafter\n")
    path.write_text("no markers\n")
    with pytest.raises(ValueError, match="has no <!-- low -->"):
        document.write_document(results)


def test_what_a_run_wrote_becomes_totals(tmp_path: Path) -> None:
    report = step_report(
        generated_tokens=10,
        kept_tokens=8,
        max_tokens=9,
        **{f"seconds_{phase}": 0.25 for phase in PHASES},
    )
    run = Recorder(tmp_path, Bars(Console(file=StringIO())))
    run.evaluation(EvalReport(step=0, accuracy=0.1))
    run.step(replace(report, unscored_rollouts=1, profile=profile_of_one_token()))
    run.step(replace(report, step=2))
    run.evaluation(EvalReport(step=2, accuracy=0.3))
    run.close()
    found = measured(tmp_path)
    assert found["curve"] == [
        {"step": 0, "wall_s": 0.0, "generated_tokens": 0, "kept_tokens": 0, "accuracy": 0.1},
        {"step": 2, "wall_s": 2.0, "generated_tokens": 20, "kept_tokens": 16, "accuracy": 0.3},
    ]
    assert (found["accuracy"], found["wall_s"], found["max_tokens"]) == (0.3, 2.0, [9, 9])
