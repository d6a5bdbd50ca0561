"""What a run may go on with. Run: python -m pytest tests/trainer/test_checkpoints.py"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch

from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.train_state import STATE_FILE, TrainState, seconds_to_write
from tests.trainer.test_train import (
    InMemoryClient,
    client,
    configured,
    folder,
    records,
    run_through,
)

__all__ = ["client", "folder"]


def test_what_does_not_change_what_is_learnt_may_change_and_is_printed(
    folder: Path, client: InMemoryClient, capsys: pytest.CaptureFixture[str]
) -> None:
    run_through(configured(folder, "run.steps=2"))
    capsys.readouterr()
    run_through(configured(folder, "run.steps=2"), resume=True)
    assert "changed since" not in capsys.readouterr().out
    changed = ("run.steps=3", 'teacher.endpoints=["127.0.0.1:9"]', "checkpoint.keep=5")
    config = configured(folder, *changed, "eval.every_steps=3", "optim.micro_batch_tokens=50")
    run_through(config, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    for change in (
        "run.steps 2 -> 3: the learning rate's schedule ends there now",
        'teacher.endpoints ["127.0.0.1:1"] -> ["127.0.0.1:9"]',
        "checkpoint.keep 2 -> 5",
        "eval.every_steps 2 -> 3",
        "optim.micro_batch_tokens 40 -> 50",
    ):
        assert f"changed since step 2: {change}" in said
    assert said.count("changed since") == 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optim.learning_rate=0.001", "optim.learning_rate 0.003 -> 0.001"),
        ("rollout.temperature=0.5", "rollout.temperature 1.0 -> 0.5"),
        ("loss.kind=forward_kl", 'loss.kind "local_support_matching" -> "forward_kl"'),
        ("run.steps=3", "run.steps 4 -> 3"),
    ],
)
def test_what_changes_what_is_learnt_is_refused_by_name_with_both_values(
    folder: Path, client: InMemoryClient, change: str, named: str
) -> None:
    config = configured(folder)
    if not (config.run.out / "checkpoints").exists():
        run_through(configured(folder, "checkpoint.every_steps=2", "run.steps=4"))
    # The last checkpoint is of step 4: one of step 2 can also go on with fewer steps.
    shutil.rmtree(config.run.out / "checkpoints" / "step-000004")
    before = (config.run.out / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError) as refused:
        run_through(configured(folder, change), resume=True)
    said = str(refused.value)
    assert named in said
    assert f"--accept-changes {change.partition('=')[0]}" in said
    assert (config.run.out / "metrics.jsonl").read_text() == before


def test_an_accepted_change_takes_effect_and_is_not_asked_for_again(
    folder: Path, client: InMemoryClient, capsys: pytest.CaptureFixture[str]
) -> None:
    run_through(configured(folder, "run.steps=2"))
    config = configured(folder, "run.steps=4", "optim.learning_rate=0.001")
    run_through(config, resume=True, accept_changes=["optim"])
    said = " ".join(capsys.readouterr().out.split())
    assert "changed since step 2: optim.learning_rate 0.003 -> 0.001 (accepted)" in said
    # Two updates a step; the cosine over eight updates is at nought after the last.
    rates = [step["learning_rate"] for step in records(config, "step")]
    assert 0.0 <= rates[3] < rates[2] < 0.001
    run_through(config, resume=True)


def test_a_key_that_is_no_setting_is_refused(folder: Path, client: InMemoryClient) -> None:
    run_through(configured(folder, "run.steps=1", "checkpoint.every_steps=1"))
    config = configured(folder, "run.steps=1", "checkpoint.every_steps=1")
    with pytest.raises(ConfigError, match=r"--accept-changes optim\.lr: there is no such setting"):
        run_through(config, resume=True, accept_changes=["optim.lr"])


def test_fewer_steps_than_are_done_are_refused(folder: Path, client: InMemoryClient) -> None:
    run_through(configured(folder))
    with pytest.raises(ConfigError, match=r"run\.steps is 3, but .*step-000004 is of step 4"):
        run_through(configured(folder, "run.steps=3"), resume=True)


def test_budget_of_another_kind_begins_anew_when_it_is_accepted(
    folder: Path, client: InMemoryClient, capsys: pytest.CaptureFixture[str]
) -> None:
    run_through(configured(folder, "run.steps=2"))
    path = folder / "trainer.toml"
    fixed, prune = 'kind = "fixed"\nmax_tokens = 10', 'kind = "prune"\ninitial = 10\nminimum = 5'
    path.write_text(path.read_text().replace(fixed, f"{prune}\nmaximum = 10"))
    with pytest.raises(ConfigError, match=r'budget\.kind "fixed" -> "prune"'):
        run_through(configured(folder), resume=True)
    run_through(configured(folder, "run.steps=3"), resume=True, accept_changes=["budget"])
    assert "the budget begins anew" in " ".join(capsys.readouterr().out.split())


def test_a_state_that_does_not_fit_is_an_error_where_nothing_was_accepted(
    folder: Path, client: InMemoryClient
) -> None:
    config = configured(folder, "run.steps=2")
    run_through(config)
    path = config.run.out / "checkpoints" / "step-000002" / STATE_FILE
    torch.save(torch.load(path) | {"budget": {"max_tokens": 3}}, path)
    with pytest.raises(CheckpointError, match="the state of budget does not fit"):
        run_through(config, resume=True)


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
