"""A run takes nobody's place unasked, and its folder says what it went by.

Run: python -m pytest tests/trainer/recording/test_run_folder.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from student_trainer import cli
from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.recording.run_folder import (
    RunRecord,
    checkpoint_to_resume,
    clear,
    excluded_ids_of,
    git_commit,
    run_of,
    versions,
)
from student_trainer.settings.config import load_config
from tests.trainer.settings.smallest_config import SMALLEST
from tests.trainer.test_train import (
    InMemoryClient,
    client,
    configured,
    connect_to,
    folder,
    records,
    run_through,
)

__all__ = ["client", "folder"]
STEP = '{"kind": "skipped", "step": 7, "unscored_rollouts": 4, "seconds_teacher_wait": 1.0}\n'
EVALUATION = '{"kind": "eval", "step": 0, "accuracy": 0.5}\n'


def holding(folder: Path, *parts: str) -> Path:
    """A run's folder that holds such parts, among what is not the run's."""
    (folder / "teacher.log").write_text("not ours")
    for part in parts:
        if part == "metrics":
            (folder / "metrics.jsonl").write_text(EVALUATION + STEP)
        elif part == "evaluation":
            (folder / "metrics.jsonl").write_text(EVALUATION)
        elif part == "broken":
            (folder / "metrics.jsonl").write_text("{\n")
        elif part == "finished":
            (folder / "summary.json").write_text('{"finished": true}')
        else:
            (folder / part).mkdir(parents=True)
    return folder


SAVED = "checkpoints/step-000007"
REFUSED = {
    ("metrics",): r"finished steps: 7\): it has no checkpoint to go on from",
    (SAVED,): r"checkpoints: 1\): --resume goes on from step-000007",
    ("student",): r"a trained student\)",
    ("broken",): r"a metrics.jsonl that cannot be read\)",
}


@pytest.mark.parametrize("parts", REFUSED)
def test_a_folder_that_holds_a_run_is_refused_with_the_ways_out(
    tmp_path: Path, parts: tuple[str, ...]
) -> None:
    holding(tmp_path, *parts)
    with pytest.raises(ConfigError, match=REFUSED[parts]) as refused:
        checkpoint_to_resume(tmp_path, resume=False, overwrite=False)
    assert re.search(r"--overwrite deletes it .* another run\.out", str(refused.value))
    assert checkpoint_to_resume(tmp_path, resume=False, overwrite=True) is None


@pytest.mark.parametrize("parts", [(), ("evaluation",)])
def test_a_folder_in_which_no_step_was_finished_is_free(
    tmp_path: Path, parts: tuple[str, ...]
) -> None:
    holding(tmp_path, *parts)
    assert checkpoint_to_resume(tmp_path, resume=False, overwrite=False) is None
    assert checkpoint_to_resume(tmp_path / "none", resume="auto", overwrite=False) is None


def test_auto_goes_on_where_there_is_a_checkpoint_and_begins_where_none_is(tmp_path: Path) -> None:
    holding(tmp_path, "metrics")
    assert checkpoint_to_resume(tmp_path, resume="auto", overwrite=False) is None
    holding(tmp_path, SAVED)
    for resume in (True, "auto"):
        found = checkpoint_to_resume(tmp_path, resume=resume, overwrite=False)  # type: ignore[arg-type]
        assert found == tmp_path / SAVED


@pytest.mark.parametrize("parts", [("student",), ("metrics", "finished")])
def test_auto_does_not_take_a_finished_run_for_one_that_was_cut_off(
    tmp_path: Path, parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match="holds an earlier run"):
        checkpoint_to_resume(holding(tmp_path, *parts), resume="auto", overwrite=False)


def test_resuming_without_a_checkpoint_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/checkpoints: no checkpoint to resume"):
        checkpoint_to_resume(holding(tmp_path, "metrics"), resume=True, overwrite=False)


def test_clearing_leaves_what_is_not_the_runs(tmp_path: Path) -> None:
    clear(holding(tmp_path, "metrics", "student", SAVED))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.log"]


def test_a_second_run_touches_nothing_unless_it_is_told_to_overwrite(
    folder: Path, client: InMemoryClient
) -> None:
    config = configured(folder, "run.steps=2", "checkpoint.every_steps=null")
    run_through(config)
    written = {path: path.read_bytes() for path in config.run.out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"finished steps: 2, a trained student"):
        run_through(config)
    assert {p: p.read_bytes() for p in config.run.out.rglob("*") if p.is_file()} == written
    (config.run.out / "notes.txt").write_text("mine")
    run_through(configured(folder, "run.steps=1", "checkpoint.every_steps=null"), overwrite=True)
    assert [step["step"] for step in records(config, "step")] == [1]
    assert (config.run.out / "notes.txt").read_text() == "mine"


def test_the_folder_says_what_the_run_went_by(
    folder: Path, client: InMemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(folder, "run.steps=1", "checkpoint.every_steps=1")
    connect_to(InMemoryClient(fail_at=2), monkeypatch)
    with pytest.raises(Exception, match="the teacher died"):
        run_through(config)
    connect_to(client, monkeypatch)
    run_through(config)
    run_through(configured(folder, "run.steps=2"), resume="auto")
    out = config.run.out
    assert json.loads((out / "config.json").read_text())["run"]["steps"] == 2
    # What it went by is a configuration of its own.
    again = load_config(out / "config.json")
    assert again == configured(folder, "run.steps=2")
    first, second = json.loads((out / "run.json").read_text())["starts"]
    assert (first["outcome"], second["outcome"]) == ("finished", "finished")
    assert (first["from_step"], second["from_step"]) == (0, 1)
    assert first["began"] <= first["ended"] <= second["began"] <= second["ended"]
    assert second["changes"] == [
        "changed since step 1: checkpoint.every_steps 1 -> 2",
        "changed since step 1: run.steps 1 -> 2: the learning rate's schedule ends there now",
    ]
    assert second["settings"]["optim.learning_rate"] == 3e-3
    assert "teacher.endpoints" not in second["settings"]
    assert second["teacher"]["model_id"] == "in-memory"
    assert {"driftline", "python", "torch", "transformers"} <= second["versions"].keys()


def test_a_start_that_failed_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect_to(InMemoryClient(fail_at=2), monkeypatch)
    config = configured(folder)
    with pytest.raises(Exception, match="the teacher died"):
        run_through(config)
    (start,) = json.loads((config.run.out / "run.json").read_text())["starts"]
    assert start["outcome"] == "failed"


def test_what_took_no_part_is_that_of_the_start_that_came_to_a_step(tmp_path: Path) -> None:
    """A resumed run may ask other teachers."""
    for name in ("student", "checkpoints/step-000002", "checkpoints/step-000004"):
        (tmp_path / name).mkdir(parents=True)
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    assert run_of(checkpoint) is None
    for from_step, ranges in ((0, ((7, 9),)), (2, ())):
        about = {"from_step": from_step, "excluded_ids": ranges}
        with RunRecord(tmp_path, config={}, resumed=from_step > 0, about=about):
            pass
    assert run_of(checkpoint) == run_of(tmp_path / "student") == tmp_path
    assert run_of(tmp_path / "checkpoints") is run_of(tmp_path / "elsewhere" / "student") is None
    assert excluded_ids_of(tmp_path, step=2) == ((7, 9),)
    assert excluded_ids_of(tmp_path, step=4) == excluded_ids_of(tmp_path) == ()


def recorded_where_nothing_can_be_written(out: Path, error: Exception | None) -> None:
    """A start whose folder goes away, ended by an error if there is one."""
    out.mkdir()
    with RunRecord(out, config={}, resumed=False, about={}):
        clear(out)
        out.rmdir()
        if error is not None:
            raise error


def test_what_ended_a_run_is_not_hidden_by_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    full = CheckpointError("the disk is full")
    with pytest.raises(CheckpointError, match="the disk is full"):
        recorded_where_nothing_can_be_written(tmp_path / "run", full)
    with pytest.raises(FileNotFoundError):
        recorded_where_nothing_can_be_written(tmp_path / "run", None)


def test_the_commit_of_a_work_tree_is_known_and_whether_files_have_changed(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    environment = os.environ | {
        f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *arguments],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    git("tag", "v1")
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_versions_are_of_what_is_installed() -> None:
    found = versions(("torch", "no-such-package"))
    assert set(found) == {"driftline", "python", "torch"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume", "--overwrite"], "not allowed with argument --resume"),
        (["--resume", "always"], "takes nothing or `auto`, not 'always'"),
    ],
)
def test_the_command_line_takes_one_way_to_start(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", "x.toml", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("typed", [["--overwrite"], ["--over"], ["--resume", "auto"], []])
def test_the_command_that_goes_on_resumes_and_overwrites_nothing(
    tmp_path: Path, typed: list[str]
) -> None:
    (tmp_path / "run" / SAVED).mkdir(parents=True)
    command = ["student-trainer", "train", "--config", "x.toml", *typed]
    arguments = cli._parser().parse_args(command[1:])
    arguments.command = command
    (tmp_path / "trainer.toml").write_text(SMALLEST)
    config = load_config(tmp_path / "trainer.toml", [f"run.out={tmp_path}/run"])
    last = cli._last_words(config, arguments).splitlines()[-1].split()
    assert "--resume" in last
    assert not any(word.startswith("--over") for word in last)
    assert cli._parser().parse_args(last[1:]).resume in (True, "auto")
