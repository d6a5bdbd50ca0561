"""What is kept of an update that is not finite.

Run: python -m pytest tests/trainer/recording/test_failed_update.py
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from student_trainer import cli
from student_trainer.assembly.run import assembled
from student_trainer.errors import DatasetError, NonFiniteLossError
from student_trainer.recording.failed_update import (
    FAILED_UPDATE,
    FailedUpdate,
    described,
    kept_if_not_finite,
    read_update,
    write_update,
)
from student_trainer.records import Rollout
from student_trainer.train_state import complete_checkpoints
from teacher_wire.records import DriftState, Scores, TokenSpan
from tests.trainer.made_rollouts import random_rollout
from tests.trainer.test_failures import files_of_at_most
from tests.trainer.test_train import (
    InMemoryClient,
    ModelSession,
    configured,
    connect_to,
    folder,
    records,
)
from tests.waiting import LIMIT_S

__all__ = ["folder"]
NOT_FINITE_AT = 3
"""Step of which one row of the teacher's makes a gradient that is not finite."""


class NotFiniteSession(ModelSession):
    """It gives an id of the first token a log-prob beyond what squares in float32."""

    async def append(self, span: TokenSpan) -> Scores:
        scores = await super().append(span)
        if span.offset == 0:
            scores.rows.topk_logprobs[0, 0] = -3e38
        return scores


class NotFiniteClient(InMemoryClient):
    """One session of a step is such a one."""

    def open(self, *arguments: object) -> ModelSession:
        session = super().open(*arguments)  # type: ignore[arg-type]
        if len(self.sessions) == (NOT_FINITE_AT - 1) * 6 + 3:
            session.__class__ = NotFiniteSession
        return session


def same(rollout: Rollout, other: Rollout) -> bool:
    def flat(values: object) -> list[object]:
        if isinstance(values, dict):
            return [item for value in values.values() for item in flat(value)]
        if isinstance(values, np.ndarray):
            return [values.dtype.str, values.shape, values.tobytes()]
        return [values] if not isinstance(values, tuple) else [i for v in values for i in flat(v)]

    return flat(asdict(rollout)) == flat(asdict(other))


def test_an_update_is_read_back_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = random_rollout(rng, masked=1)
    full = replace(
        random_rollout(rng, has_candidates=False),
        prompt=replace(plain.prompt, answer="7", turns=(np.array([3], np.int32),)),
        drift=DriftState(num_tokens=5, num_bad_events=2, exhausted_at=4),
        behavior_logprobs_at_teacher_topk=np.full((5, 4), -np.inf, np.float32),
        sampled=np.array([True, True, False, True, True]),
        policy_version=9,
        loss_weight=0.5,
    )
    assert not same(plain, full)
    path = tmp_path / FAILED_UPDATE
    write_update(path, FailedUpdate(step=3, update=2, rollouts=[plain, full]))
    read = read_update(path)
    assert (read.step, read.update) == (3, 2)
    assert [same(*pair) for pair in zip(read.rollouts, [plain, full], strict=True)] == [True, True]
    assert [*tmp_path.iterdir()] == [path]
    first, *lines = described(read)
    assert first == "step 3, update 2: 2 rollouts"
    assert lines[0].endswith("5 tokens of weights 0, not finite: nothing")
    assert lines[1].endswith("of weights 9, not finite: behavior_logprobs_at_teacher_topk")


def test_a_run_ends_with_the_rollouts_of_the_update_and_what_was_saved_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connect_to(NotFiniteClient(), monkeypatch)
    overrides = ("optim.updates_per_epoch=1", "data.heldout=null", "checkpoint.every_steps=2")
    config = configured(folder, *overrides)
    sets = [word for override in overrides for word in ("--set", override)]
    command = ["train", "--config", str(folder / "trainer.toml"), *sets]
    assert cli.main(command) == cli.EXIT_FAILED
    line = capsys.readouterr().err.splitlines()[-1]
    path = config.run.out / FAILED_UPDATE
    assert line.replace("is nan", "is inf") == (
        "NonFiniteLossError: the gradient norm is inf; the weights are left as they were (step 3, "
        f"update 1); its 6 rollouts are in {path}; look at them with "
        f"`python -m student_trainer.recording.failed_update {path}`"
    )
    assert [step["step"] for step in records(config, "step")] == [1, 2]
    (checkpoint,) = complete_checkpoints(config.run.checkpoints)
    assert checkpoint.name == "step-000002"

    failed = read_update(path)
    assert (failed.step, failed.update, len(failed.rollouts)) == (3, 1, 6)
    assert {rollout.policy_version for rollout in failed.rollouts} == {2}
    with assembled(config, resume=True) as run:
        before = {name: tensor.clone() for name, tensor in run.learner.weights()}
        with pytest.raises(NonFiniteLossError, match="gradient norm is "):
            run.learner.learn(failed.rollouts, failed.step - 1)
        after = dict(run.learner.weights())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_command_of_the_error_shows_them(tmp_path: Path) -> None:
    rollout = random_rollout(np.random.default_rng(0))
    rollout.teacher.topk_logprobs[2, 1] = np.nan
    path = tmp_path / FAILED_UPDATE
    write_update(path, FailedUpdate(step=1, update=1, rollouts=[rollout]))
    command = [sys.executable, "-m", "student_trainer.recording.failed_update", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stdout.splitlines() == [
        "step 1, update 1: 1 rollouts",
        "0: 3, 5 tokens of weights 0, not finite: teacher.topk_logprobs",
    ]


def test_a_full_disk_does_not_hide_why_the_run_ended(tmp_path: Path) -> None:
    rollouts = [random_rollout(np.random.default_rng(0), num_response=200)]
    with (
        pytest.raises(
            NonFiniteLossError, match=r"^it is nan \(step 4, update 2\); its 1 "
        ) as error,
        files_of_at_most(1000),
        kept_if_not_finite(tmp_path, 4, lambda: (2, rollouts)),
    ):
        raise NonFiniteLossError("it is nan")
    assert f"rollouts could not be kept in {tmp_path / FAILED_UPDATE}: " in str(error.value)
    assert [*tmp_path.iterdir()] == []


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"step": 1}, path)
    with pytest.raises(DatasetError, match=r"other\.pt: not the rollouts of an update: .*rollouts"):
        read_update(path)
