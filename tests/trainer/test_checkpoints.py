"""What a run may go on with. Run: python -m pytest tests/trainer/test_checkpoints.py"""

from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest

from student_trainer.assembly.checkpoints import determining_settings
from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.train_state import TrainState, seconds_to_write
from tests.trainer.test_train import (
    InMemoryClient,
    client,
    configured,
    folder,
    records,
    run_through,
)

__all__ = ["client", "folder"]


def test_resumed_run_names_the_settings_that_changed_and_follows_them(
    folder: Path, client: InMemoryClient, capsys: pytest.CaptureFixture[str]
) -> None:
    run_through(configured(folder, "run.steps=2"))
    capsys.readouterr()
    run_through(configured(folder, "run.steps=2", "checkpoint.keep=5"), resume=True)
    assert "settings changed" not in capsys.readouterr().out
    changes = ("run.steps=4", "optim.learning_rate=0.001", 'teacher.endpoints=["127.0.0.1:9"]')
    config = configured(folder, *changes)
    run_through(config, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    named = "optim.learning_rate 0.003 -> 0.001, run.steps 2 -> 4 (settings "
    assert f"warning: these settings changed since step 2: {named}" in said
    # Two updates a step, of eight by a cosine: that of the step's second one.
    rates = [step["learning_rate"] for step in records(config, "step")]
    assert rates[2] == pytest.approx(0.001 * 0.5 * (1 + math.cos(math.pi * 5 / 8)), rel=1e-6)
    assert rates[3] == pytest.approx(0.001 * 0.5 * (1 + math.cos(math.pi * 7 / 8)), rel=1e-6)


def test_fewer_steps_than_are_done_are_refused(folder: Path, client: InMemoryClient) -> None:
    run_through(configured(folder))
    with pytest.raises(ConfigError, match=r"run\.steps is 3, but .*step-000004 is of step 4"):
        run_through(configured(folder, "run.steps=3"), resume=True)


def test_budget_of_another_kind_is_refused(folder: Path, client: InMemoryClient) -> None:
    run_through(configured(folder, "run.steps=2"))
    path = folder / "trainer.toml"
    fixed, prune = 'kind = "fixed"\nmax_tokens = 10', 'kind = "prune"\ninitial = 10\nminimum = 5'
    path.write_text(path.read_text().replace(fixed, f"{prune}\nmaximum = 10"))
    with pytest.raises(CheckpointError, match="the state of budget does not fit"):
        run_through(configured(folder), resume=True)


def test_where_things_are_does_not_determine_a_run(folder: Path) -> None:
    named = determining_settings(configured(folder))
    assert {"optim.learning_rate", "run.seed", "teacher.k", "loss.kind", "data.train"} <= set(named)
    assert not {"run.out", "teacher.endpoints", "teacher.tls_ca", "checkpoint.keep"} & set(named)


def test_model_whose_checkpoint_takes_too_long_says_so_at_the_start(
    folder: Path,
    client: InMemoryClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "student_trainer.assembly.checkpoints.seconds_to_write", lambda *_, **__: 90.0
    )
    monkeypatch.setattr(TrainState, "save", lambda _: None)
    run_through(configured(folder, "run.steps=1"))
    said = " ".join(capsys.readouterr().out.split())
    assert "takes about 90 s to write" in said
    assert "SIGTERM ends this run after that long and not within 25 s" in said


def test_probe_of_a_full_disk_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("student_trainer.train_state.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        seconds_to_write(tmp_path, 1 << 40, limit_s=25.0)
    assert [*tmp_path.iterdir()] == []
