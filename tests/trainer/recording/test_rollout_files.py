"""What a run records of its rollouts: which, what of them, and at whose cost.

Run: python -m pytest tests/trainer/recording/test_rollout_files.py
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_records.measures import mean
from rollout_records.reading import read_rollout, read_table, steps
from rollout_records.schema import Origin
from student_trainer.recording import rollout_files
from student_trainer.recording.rollout_files import RolloutFiles
from student_trainer.recording.rollout_rows import RowMaker, chosen
from student_trainer.records import Finish, Rollout
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.records import DriftPolicy, DriftState
from tests.trainer.made_rollouts import plain_rollout, random_rollout

POLICIES = {
    None: DriftPolicy(metric=OverlapRatio(k=2), w_drop=0.25),
    "b": DriftPolicy(metric=OverlapRatio(k=2), w_drop=0.5),
}
MAKER = RowMaker(
    decode=lambda ids: "".join(chr(97 + i % 26) for i in ids.tolist()),
    is_right=lambda rollout: None if rollout.prompt.answer is None else True,
    policies=POLICIES,
)


def files(
    folder: Path,
    *,
    per_step: int | None = None,
    rank: int = 0,
    max_bytes: int = 10**9,
    maker: RowMaker = MAKER,
    say: Callable[[str], None] = pytest.fail,
    origin: Callable[[], Origin] = Origin,
) -> RolloutFiles:
    return RolloutFiles(
        folder,
        per_step=per_step,
        max_bytes=max_bytes,
        rank=rank,
        maker=maker,
        origin=origin,
        say=say,
    )


def rollouts(count: int, *, stopped: tuple[int, ...] = ()) -> list[Rollout]:
    rng = np.random.default_rng(count)
    made = [random_rollout(rng, num_response=4 + i) for i in range(count)]
    return [replace(r, finish=Finish.TRUNCATED) if i in stopped else r for i, r in enumerate(made)]


def weights_of(recorded: dict[int, Rollout]) -> dict[int, np.ndarray[Any, Any]]:
    return {index: np.full(len(r), 1.0 + index, np.float32) for index, r in recorded.items()}


def test_the_chosen_are_spread_over_the_step_and_one_of_them_was_stopped() -> None:
    assert list(chosen(rollouts(16), 4)) == [2, 6, 10, 14]
    assert list(chosen(rollouts(16, stopped=(9, 11)), 4)) == [2, 6, 9, 14]
    assert list(chosen(rollouts(16, stopped=(6, 9)), 4)) == [2, 6, 10, 14]
    assert list(chosen(rollouts(3), 8)) == list(chosen(rollouts(3), None)) == [0, 1, 2]
    assert list(chosen(rollouts(16, stopped=(0,)), 1)) == [0]
    assert chosen(rollouts(16, stopped=(3,)), 0) == {}
    assert chosen([], 8) == chosen([], None) == {}


def test_a_row_says_what_the_rollout_says(tmp_path: Path) -> None:
    rollout = random_rollout(np.random.default_rng(0), num_response=6, masked=1)
    counts = np.array([2, 1, 0, 2, 2, 1], np.uint8)
    bad = np.array([0, 1, 1, 0, 0, 1], np.bool_)
    rollout = replace(
        rollout,
        prompt=replace(rollout.prompt, answer="x", teacher="b"),
        teacher=replace(rollout.teacher, overlap_counts=counts, bad_events=bad),
        drift=DriftState(num_tokens=6, num_bad_events=3, exhausted_at=3),
        finish=Finish.TRUNCATED,
        num_generated=9,
        policy_version=4,
        times=replace(rollout.times, started_at=1_700_000_000.5, scored_s=1.5),
    )
    recording = files(tmp_path)
    recording.write(5, {3: rollout}, {3: np.arange(6, dtype=np.float32)})
    recording.close()
    row = read_rollout(steps(tmp_path)[5], 3)
    assert (row["step"], row["index"], row["teacher"], row["answer"]) == (5, 3, "b", "x")
    assert (row["finish"], row["verdict"], row["correct"]) == ("truncated", "truncate", True)
    assert (row["num_tokens"], row["num_generated"], row["num_bad_events"]) == (6, 9, 3)
    assert (row["exhausted_at"], row["policy_version"]) == (3, 4)
    assert (row["generate_s"], row["score_wait_s"]) == (1.0, 0.5)
    assert row["started_at"].timestamp() == 1_700_000_000.5
    assert row["response"] == MAKER.decode(rollout.response_ids)
    np.testing.assert_array_equal(row["overlap"], [1.0, 0.5, 0.0, 1.0, 1.0, 0.5])
    # By the policy of its own teacher.
    np.testing.assert_array_equal(row["reliability"], [1.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(row["weight"], np.arange(6))
    assert row["mean_overlap"] == pytest.approx(4 / 6)
    assert row["mean_teacher_logprob"] == pytest.approx(
        mean(rollout.teacher.token_logprobs, rollout.mask), rel=1e-3
    )
    assert row["sampled"] is None
    assert row["ranks"] is None
    assert row["entropies"] == pytest.approx(rollout.teacher.entropies, rel=1e-3)


def test_what_was_not_asked_for_is_missing_and_no_number(tmp_path: Path) -> None:
    rollout = random_rollout(np.random.default_rng(1), has_candidates=False)
    bare = replace(
        rollout,
        student_topk_ids=np.zeros((5, 0), np.int32),
        student_topk_logprobs=np.zeros((5, 0), np.float32),
        teacher=replace(rollout.teacher, bad_events=None, entropies=None),
        mask=np.zeros(5, np.bool_),
        sampled=np.array([1, 1, 0, 1, 1], np.bool_),
    )
    recording = files(tmp_path)
    recording.write(1, {0: bare}, {})
    recording.close()
    row = read_rollout(steps(tmp_path)[1], 0)
    missing = {name for name, value in row.items() if value is None}
    assert missing == {
        *("answer", "teacher", "num_bad_events", "exhausted_at", "correct", "started_at"),
        *("mean_overlap", "mean_teacher_logprob", "mean_reverse_kl", "reverse_kl", "overlap"),
        *("bad_events", "reliability", "weight", "entropies", "ranks", "student_topk_ids"),
        *("student_topk_logprobs", "teacher_logprobs_at_student_topk"),
    }
    np.testing.assert_array_equal(row["sampled"], bare.sampled)


def test_each_of_several_processes_writes_what_it_learnt_from(tmp_path: Path) -> None:
    step = dict(enumerate(rollouts(4)))
    unlearnt = replace(rollouts(1)[0], mask=np.zeros(4, np.bool_))
    step[4] = unlearnt
    known = weights_of(step)
    for rank, own in ((0, (0, 2)), (1, (1, 3)), (2, ())):
        recording = files(tmp_path, rank=rank)
        recording.write(3, step, {index: known[index] for index in own})
        recording.close()
    (paths,) = steps(tmp_path).values()
    assert [path.name for path in paths] == ["step-000003.parquet", "step-000003.1.parquet"]
    assert read_table(paths, ["index"]).column(0).to_pylist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(read_rollout(paths, 3)["weight"], known[3])


def test_the_loop_hands_over_references_and_makes_no_row(tmp_path: Path) -> None:
    made_in: set[str] = set()

    def decode(ids: np.ndarray[Any, Any]) -> str:
        made_in.add(threading.current_thread().name)
        return ""

    recording = files(tmp_path, maker=replace(MAKER, decode=decode))
    taken = rollouts(5)
    step = recording.chosen(taken)
    assert all(step[index] is rollout for index, rollout in enumerate(taken))
    for number in range(1, 4):
        recording.write(number, step, weights_of(step))
    recording.close()
    assert made_in == {"rollout files"}
    assert list(steps(tmp_path)) == [1, 2, 3]
    recording.close()  # a second time does nothing


def test_nothing_recorded_begins_no_thread_and_makes_no_folder(tmp_path: Path) -> None:
    before = threading.active_count()
    recording = files(tmp_path / "rollouts", per_step=0)
    assert recording.chosen(rollouts(3)) == {}
    recording.write(1, {}, {})
    assert threading.active_count() == before
    recording.close()
    assert not (tmp_path / "rollouts").exists()


def test_a_disk_that_refuses_is_told_of_once_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    write, refusing = rollout_files.write_step, [True, True, False]

    def refuses(*arguments: Any) -> Path:
        if refusing.pop(0):
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(rollout_files, "write_step", refuses)
    recording = files(tmp_path, say=said.append)
    step = recording.chosen(rollouts(2))
    for number in (1, 2, 3):
        recording.write(number, step, weights_of(step))
    recording.close()
    (text,) = said
    assert "step 1 could not be written" in text
    assert "No space left" in text
    assert list(steps(tmp_path)) == [3]


def test_a_row_that_cannot_be_made_is_told_of_and_the_next_step_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    answers = iter([RuntimeError("odd"), ""])

    def decode(_: object) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    recording = files(tmp_path, maker=replace(MAKER, decode=decode), say=said.append)
    for number in (1, 2):
        step = recording.chosen(rollouts(1))
        recording.write(number, step, weights_of(step))
    recording.close()
    assert len(said) == 1
    assert "RuntimeError: odd" in said[0]
    assert list(steps(tmp_path)) == [2]


def test_older_steps_are_thinned_out_and_that_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    recording = files(tmp_path, max_bytes=1, say=said.append)
    step = recording.chosen([plain_rollout(overlap_counts=[1, 2])])
    for number in range(1, 6):
        recording.write(number, step, weights_of(step))
    recording.close()
    assert list(steps(tmp_path)) == [5]
    assert [text.partition(":")[0] for text in said] == ["recording.max_bytes"]
