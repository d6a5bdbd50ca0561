"""By what a checkpoint is the best.

Run: python -m pytest tests/trainer/settings/test_best_metric.py
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from student_trainer.diagnostics.step_report import EvalReport, HeldoutReport
from student_trainer.errors import ConfigError
from student_trainer.settings.best_metric import HIGHER_IS_BETTER, higher_is_better
from student_trainer.settings.config import TrainerConfig, load_config
from tests.trainer.settings.smallest_config import SMALLEST

EVALUATED = ("data.heldout=heldout.jsonl", "eval.max_tokens=9")


def configured(folder: Path, *overrides: str) -> TrainerConfig:
    path = folder / "trainer.toml"
    path.write_text(SMALLEST)
    return load_config(path, overrides)


def test_every_known_figure_is_one_of_an_evaluation() -> None:
    said = {
        f"heldout_{field.name}" for field in fields(HeldoutReport) if field.name != "heldout"
    } | {field.name.replace("_at_k", "_at_K") for field in fields(EvalReport)}
    assert HIGHER_IS_BETTER.keys() <= said


@pytest.mark.parametrize(
    ("name", "higher"),
    [
        ("heldout_reverse_kl", False),
        ("heldout_forward_kl", False),
        ("heldout_teacher_logprob", True),
        ("accuracy", True),
        ("pass_at_4", True),
        ("avg_at_4", True),
    ],
)
def test_the_direction_of_a_figure_is_known(tmp_path: Path, name: str, higher: bool) -> None:
    config = configured(
        tmp_path, *EVALUATED, "checkpoint.keep_best=1", f"checkpoint.best_metric={name}"
    )
    assert higher_is_better(config.checkpoint.best_metric) is higher


@pytest.mark.parametrize("name", ["loss", "heldout_length", "mean_tokens", "pass_at_K", "pass_at"])
def test_a_figure_of_no_direction_is_refused_with_those_that_have_one(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(tmp_path, f"checkpoint.best_metric={name}")
    said = str(refused.value)
    assert f"checkpoint.best_metric: {name!r} is no figure" in said.replace("Value error, ", "")
    assert all(known in said for known in HIGHER_IS_BETTER)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "by checkpoint.best_metric heldout_reverse_kl: without data.heldout nothing is"),
        ([*EVALUATED, "eval.teacher_samples=0"], "the teacher's, and eval.teacher_samples is 0"),
        ([*EVALUATED, "checkpoint.best_metric=pass_at_3"], r"eval.pass_k is [4]"),
        (
            [*EVALUATED, "checkpoint.best_metric=avg_at_2", "eval.pass_k=[2,4]"],
            "eval.pass_k is [2, 4]",
        ),
    ],
)
def test_a_figure_that_no_evaluation_of_the_run_has_is_refused(
    tmp_path: Path, overrides: list[str], reason: str
) -> None:
    assert configured(tmp_path, *overrides).checkpoint.keep_best == 0
    with pytest.raises(ConfigError) as refused:
        configured(tmp_path, *overrides, "checkpoint.keep_best=2")
    assert "checkpoint.keep_best is 2 by " in str(refused.value)
    assert reason in str(refused.value)
