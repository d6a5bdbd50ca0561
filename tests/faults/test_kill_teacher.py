"""Training goes on when its teacher is killed, and what it learns is what it would have learnt.

Run: pytest tests/faults/test_kill_teacher.py
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from student_trainer.records import Rollout
from student_trainer.train_state import read_state
from teacher_wire.records import ScoreRows
from tests.faults.forked_processes import ForkedTeacher
from tests.faults.training_runs import CHECKPOINTS, FAKE, Run, meanwhile, until_scored
from tests.rounds import in_the_long_round
from tests.waiting import eventually

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedTeacher]:
    """A fake teacher with the playground's vocabulary; each test leaves it running."""
    made = ForkedTeacher(tmp_path_factory.mktemp("teacher"), **FAKE)
    made.start()
    try:
        asyncio.run(made.until_ready())
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def straight(teacher: ForkedTeacher, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The undisturbed run."""
    run = Run(tmp_path_factory.mktemp("straight")).train(teacher.address)
    assert run.exit_code == 0
    assert [record["step"] for record in run.records("step")] == [1, 2, 3, 4]
    return run


async def bring_back(teacher: ForkedTeacher) -> None:
    teacher.start()
    await teacher.until_ready()


def assert_same_rows(left: list[Rollout], right: list[Rollout], tolerance: float = 0.0) -> None:
    """The same responses with the same rows: ids to the bit, probabilities to the tolerance."""
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one.response_ids, other.response_ids)
        # Their counts go on past a stop, by as many tokens as came with the deciding append.
        assert one.drift is not None
        assert other.drift is not None
        assert (one.drift.exhausted_at, one.finish) == (other.drift.exhausted_at, other.finish)
        for entry in fields(ScoreRows):
            a, b = getattr(one.teacher, entry.name), getattr(other.teacher, entry.name)
            if tolerance == 0.0 or np.asarray(a).dtype != np.float32:
                np.testing.assert_array_equal(a, b, err_msg=entry.name)
            else:
                np.testing.assert_allclose(np.exp(a), np.exp(b), rtol=0, atol=tolerance)
                # The order of summation alone, which depends on where appends are cut, moves
                # log-probs near -13 by 1e-5 nats and a little more, killed or not.
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-4, err_msg=entry.name)


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_a_run_whose_teacher_is_killed_again_and_again_learns_the_same(
    teacher: ForkedTeacher, straight: Run, tmp_path: Path
) -> None:
    random.seed(3)
    run, num_killed = Run(tmp_path / "run"), 0

    async def kill() -> None:
        nonlocal num_killed
        for _ in range(3):
            await until_scored(teacher, random.randint(20, 80))
            teacher.kill()
            num_killed += 1
            # Longer than teacher.connect_timeout_s: the run waits for it all the same.
            await asyncio.sleep(1.5)
            await bring_back(teacher)
        assert len(run.records("step")) < 4, "the kills came after the run"

    with meanwhile(kill):
        run.train(teacher.address)
    assert (run.exit_code, num_killed) == (0, 3)
    assert_same_rows(run.rollouts, straight.rollouts)
    assert_same_weights(run.weights(4), straight.weights(4))
    assert all(batch.num_unscored == 0 for batch in run.batches)


def test_a_run_that_must_fail_does_and_its_last_checkpoint_goes_on(
    teacher: ForkedTeacher, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")

    async def kill() -> None:
        await eventually(lambda: len(run.records("step")) == 2)
        await until_scored(teacher, 20)
        teacher.kill()

    with meanwhile(kill):
        run.train(teacher.address, teacher__on_absent="fail")
    assert run.exit_code == 1
    error = capsys.readouterr().err
    assert f"NotReadyError: no teacher at {teacher.address} is ready after 1.0 s" in error
    assert "Traceback" not in error
    done = len(run.records("step"))
    assert 2 <= done < 4

    asyncio.run(bring_back(teacher))
    run.train(teacher.address, resume=True, teacher__on_absent="fail")
    assert run.exit_code == 0
    assert [record["step"] for record in run.records("step")] == [1, 2, 3, 4]
    assert_same_rows(run.rollouts, straight.rollouts)
    assert_same_weights(run.weights(4), straight.weights(4))


def test_steps_without_a_teacher_are_skipped_and_change_nothing(
    teacher: ForkedTeacher, straight: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")

    async def kill() -> None:
        await eventually(lambda: len(run.records("step")) == 1)
        teacher.kill()
        await eventually(lambda: len(run.records("skipped")) >= 2)
        await bring_back(teacher)

    with meanwhile(kill):
        run.train(teacher.address, teacher__on_absent="finish_unscored", run__steps=16)
    assert run.exit_code == 0
    steps, skipped = run.records("step"), run.records("skipped")
    assert sorted(record["step"] for record in [*steps, *skipped]) == list(range(1, 17))
    assert steps[-1]["step"] > skipped[-1]["step"], "nothing was learnt after the teacher was back"
    for record in skipped:
        step = int(record["step"])
        assert (record["unscored_rollouts"], record["updates"]) == (4, 0)
        assert_same_weights(run.weights(step), run.weights(step - 1))
        checkpoints = run.folder / "checkpoints"
        before, after = (
            read_state(checkpoints / f"step-{number:06d}")["learner"] for number in (step - 1, step)
        )
        assert str(before) == str(after)
    warned = {r["step"] for r in run.records("warning") if r["warning"] == "unscored"}
    assert {record["step"] for record in skipped} <= warned
    # What was scored before the kill is the teacher's word, and nothing was made up since.
    assert_same_rows(run.batches[0].rollouts, straight.batches[0].rollouts)
    assert all(len(rollout.teacher) == len(rollout) for rollout in run.rollouts)


@in_the_long_round  # vLLM's rows after a kill: test_kill_vllm.py
@pytest.mark.parametrize("engine", ["hf"])
def test_rows_of_a_real_teacher_are_the_same_after_a_kill(engine: str, tmp_path: Path) -> None:
    teacher = ForkedTeacher(
        tmp_path,
        engine=engine,
        model=str(CHECKPOINTS / "teacher"),
        dtype="float32",
        max_context=320,
        max_k=16,
    )
    # So small that the rows of the second step belong to the same responses.
    settings = {"run__steps": 2, "optim__learning_rate": 1e-7, "optim__final_learning_rate": 0}
    teacher.start()
    try:
        asyncio.run(teacher.until_ready())
        undisturbed = Run(tmp_path / "undisturbed").train(teacher.address, **settings)
        run, num_killed = Run(tmp_path / "run"), 0

        async def kill() -> None:
            nonlocal num_killed
            await until_scored(teacher, 30)
            teacher.kill()
            num_killed += 1
            assert not run.records("step")
            await bring_back(teacher)

        with meanwhile(kill):
            run.train(teacher.address, **settings)
    finally:
        teacher.kill()
    assert (undisturbed.exit_code, run.exit_code, num_killed) == (0, 0, 1)
    assert_same_rows(run.rollouts, undisturbed.rollouts, tolerance=1e-5)
