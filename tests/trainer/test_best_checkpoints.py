"""Which checkpoints stay. Run: python -m pytest tests/trainer/test_best_checkpoints.py"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from student_trainer.best_checkpoints import EVALUATION_FILE, Best, figures_of
from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.train_state import TrainState, complete_checkpoints, step_of
from tests.trainer.test_train import (
    InMemoryClient,
    client,
    configured,
    folder,
    records,
    run_through,
)

__all__ = ["client", "folder"]


def state_of(
    folder: Path, *, keep: int = 1, keep_best: int = 1, higher: bool = False
) -> TrainState:
    """Of a run without weights."""
    best = Best(keep=keep_best, metric="figure", higher_is_better=higher)
    return TrainState(
        folder, keep=keep, save_weights=lambda _: None, parts={}, settings={}, best=best
    )


def saved(state: TrainState, figures: Mapping[int, float | None]) -> list[int]:
    """Saves these steps, evaluated where there is a figure; the steps of what stays."""
    for step, figure in figures.items():
        state.step = step
        if figure is not None:
            state.evaluated({"figure": figure, "other": 0.0})
        state.save()
    return steps(state._folder)


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(folder)]


@pytest.mark.parametrize(
    ("rule", "figures", "stay"),
    [
        ({}, {1: 0.5, 2: 0.2, 3: 0.3, 4: 0.4}, [2, 4]),
        ({"higher": True}, {1: 0.5, 2: 0.2, 3: 0.3, 4: 0.4}, [1, 4]),
        ({"keep_best": 2}, {1: 0.5, 2: 0.2, 3: 0.3, 4: 0.4}, [2, 3, 4]),
        # The best among the newest: nothing besides.
        ({}, {1: 0.5, 2: 0.4, 3: 0.3}, [3]),
        ({"keep": 2}, {1: 0.1, 2: 0.4, 3: 0.3, 4: 0.2}, [1, 3, 4]),
        # No evaluation, no best one; of equal ones the newer.
        ({}, {1: None, 2: 0.9, 3: None, 4: None}, [2, 4]),
        ({}, {1: 0.5, 2: 0.5, 3: 0.7}, [2, 3]),
        ({"keep_best": 0}, {1: 0.1, 2: 0.4, 3: 0.3}, [3]),
        ({"keep_best": 3}, {1: None, 2: None}, [2]),
    ],
)
def test_the_newest_stay_and_the_best(
    tmp_path: Path, rule: dict[str, Any], figures: dict[int, float | None], stay: list[int]
) -> None:
    assert saved(state_of(tmp_path, **rule), figures) == stay
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{step:06d}" for step in stay}


def test_the_best_is_known_to_whoever_goes_on(tmp_path: Path) -> None:
    assert saved(state_of(tmp_path), {1: 0.1, 2: 0.2}) == [1, 2]
    assert saved(state_of(tmp_path), {3: 0.3, 4: 0.05}) == [4]
    # A figure is not that of the step after it.
    state = state_of(tmp_path)
    assert saved(state, {5: 0.01, 6: None, 7: None}) == [5, 7]


def test_an_evaluation_after_the_checkpoint_of_its_step_counts(tmp_path: Path) -> None:
    """As one that SIGTERM cut off and the resumed run makes up for."""
    saved(state_of(tmp_path), {1: None})
    state = state_of(tmp_path)
    state.step = 1
    state.evaluated({"figure": 0.1})
    assert saved(state, {2: 0.2, 3: 0.3}) == [1, 3]


def test_what_a_killed_run_left_of_a_checkpoint_goes_with_the_next(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    for name in (".step-000001.old", ".step-000002.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / EVALUATION_FILE).write_text('{"figure": 0}')
    assert saved(state, {3: 0.3}) == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_what_a_killed_run_left_goes_when_the_run_is_finished(tmp_path: Path) -> None:
    """Nothing is saved any more by one that was killed as the last checkpoint was there."""
    saved(state_of(tmp_path, keep=3, keep_best=0), {1: None, 2: None, 3: None})
    (tmp_path / ".step-000000.old").mkdir()
    state_of(tmp_path, keep_best=0).drop_old()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_half_a_deleted_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(tmp_path, keep_best=0)
    saved(state, {1: 0.1})

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    state.step = 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **how: None if how else killed(path))
        with pytest.raises(KeyboardInterrupt):
            state.save()
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[1]", "must be an object")])
def test_a_broken_file_of_figures_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / EVALUATION_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=rf"evaluation\.json: {reason}.*; delete it or its"):
        figures_of(tmp_path)


def test_a_run_keeps_its_best_checkpoint_through_a_resume(
    folder: Path, client: InMemoryClient
) -> None:
    best = (
        "checkpoint.every_steps=1",
        "eval.every_steps=1",
        "checkpoint.keep=1",
        "checkpoint.keep_best=1",
        "eval.pass_k=0",
    )
    checkpoints = folder / "run" / "checkpoints"
    for until in (3, 5):
        config = configured(folder, f"run.steps={until}", *best)
        run_through(config, resume=until == 5)
        rated = {
            int(record["step"]): record["heldout_reverse_kl"]
            for record in records(config, "eval")
            if record["step"] > 0
        }
        expected = min(rated, key=lambda step: (rated[step], -step))
        assert steps(checkpoints) == sorted({expected, until})
    (metrics,) = [record for record in records(config, "eval") if record["step"] == 5]
    written = json.loads((checkpoints / "step-000005" / EVALUATION_FILE).read_text())
    assert written == {k: v for k, v in metrics.items() if k in written}
    assert written["heldout_reverse_kl"] == metrics["heldout_reverse_kl"]


def test_a_figure_of_answers_without_answers_is_refused_before_anything_is_loaded(
    folder: Path,
) -> None:
    (folder / "heldout.jsonl").write_text(json.dumps({"prompt": "1"}))
    (folder / "student" / "model.safetensors").unlink()
    config = configured(
        folder,
        f"data.heldout={folder}/heldout.jsonl",
        "checkpoint.keep_best=1",
        "checkpoint.best_metric=accuracy",
    )
    with pytest.raises(ConfigError, match=r"no answer, and checkpoint\.keep_best is 1 by .*accur"):
        run_through(config)
