"""What whole runs record of their rollouts: of every step, with the weights that the loss had.

Run: python -m pytest tests/trainer/test_recorded_runs.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from rollout_records.reading import origin, read_rollout, read_table, steps
from student_trainer.learner.token_weights import TokenWeights
from student_trainer.losses.weights import prune_weights
from student_trainer.recording.run_folder import read_record
from teacher_wire.errors import EngineError
from tests.trainer.test_train import (
    InMemoryClient,
    StoppingClient,
    client,
    configured,
    connect_to,
    folder,
    records,
    run_through,
    taken_by,
)

__all__ = ["client", "folder"]
UNEVALUATED = ("data.heldout=null", "eval={}", "trackers.report_to=[]")
OF_THIS_RUN = {"started_at", "generate_s", "score_wait_s"}


def recorded(run: Path) -> dict[int, pa.Table]:
    return {step: read_table(paths) for step, paths in steps(run / "rollouts").items()}


def test_a_run_that_died_has_recorded_what_one_that_did_not_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rollouts of every step, and of a killed run's later steps none twice."""
    asked = (*UNEVALUATED, "recording.rollouts_per_step=all")
    connect_to(InMemoryClient(), monkeypatch)
    straight = configured(folder, f"run.out={folder}/straight", *asked)
    run_through(straight)
    # It dies in step 4, after step 3, and goes on after step 2.
    config = configured(folder, *asked)
    connect_to(InMemoryClient(fail_at=3 * 6 + 2), monkeypatch)
    with pytest.raises(EngineError):
        run_through(config)
    died = recorded(config.run.out)
    assert list(died) == [1, 2, 3]
    half = config.run.out / "rollouts" / "step-000009.parquet.1.partial"
    half.write_bytes(b"PAR1")
    connect_to(InMemoryClient(), monkeypatch)
    run_through(config, resume=True)
    assert not half.exists()

    expected, found = recorded(straight.run.out), recorded(config.run.out)
    assert list(found) == list(expected) == [1, 2, 3, 4]
    for step, table in expected.items():
        for name in set(table.column_names) - OF_THIS_RUN:
            assert found[step].column(name).equals(table.column(name)), (step, name)
        assert table.column("index").to_pylist() == list(range(6))
        said = records(straight, "step")[step - 1]
        assert sum(table.column("num_tokens").to_pylist()) == said["kept_tokens"]
        assert sum(table.column("num_generated").to_pylist()) == said["generated_tokens"]
        assert set(table.column("policy_version").to_pylist()) == {step - 1}
    told = origin(steps(config.run.out / "rollouts")[1][0])
    (start,) = read_record(straight.run.out)["starts"]
    assert (told.student, told.run, told.teachers) == (
        config.student.model,
        "run",
        {"": "in-memory"},
    )
    assert told.commit == start["git_commit"]
    assert told.drift_policy is not None
    assert told.drift_policy["w_drop"] == 0.01


def test_the_recorded_weights_are_those_of_the_loss(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first pass over them, whatever micro-batch and update they came in."""
    connect_to(StoppingClient(), monkeypatch)
    config = configured(
        folder,
        *("run.steps=1", "optim.epochs=2", "optim.micro_batch_tokens=30", *UNEVALUATED),
        *("weights.prune.w_base=0.5", "drift.w_drop=0.25", 'special_tokens.tokens=["1"]'),
    )
    run_through(config)
    (table,) = recorded(config.run.out).values()
    stopped = [finish == "truncated" for finish in table.column("finish").to_pylist()]
    assert sum(stopped) > 3
    verdicts = table.column("verdict").to_pylist()
    assert verdicts == [("continue", "truncate")[of_this] for of_this in stopped]
    paths = steps(config.run.out / "rollouts")[1]
    weights = []
    for index in range(6):
        row = read_rollout(paths, index)
        bad, mask = (torch.from_numpy(row[name])[None] for name in ("bad_events", "mask"))
        expected = prune_weights(bad, mask, w_drop=0.25, w_base=0.5)[0]
        np.testing.assert_array_equal(row["weight"], expected)
        weights += row["weight"][row["mask"]].tolist()
        assert row["reliability"][-1] < 1.0
    said = records(config, "step")[0]
    assert said["weight_mean"] == pytest.approx(np.mean(weights))
    assert (said["weight_min"], said["weight_max"]) == (min(weights), max(weights))
    assert said["overlap"] == pytest.approx(
        np.mean(np.concatenate(table.column("overlap").to_pylist())), abs=1e-3
    )


def test_a_run_records_as_many_as_it_is_asked_for(
    folder: Path, client: InMemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[int] = []
    note = TokenWeights.by_number

    def counted(weights: TokenWeights) -> dict[int, np.ndarray]:
        found = note(weights)
        noted.append(len(found))
        return found

    monkeypatch.setattr(TokenWeights, "by_number", counted)
    for number, asked in enumerate((0, 2)):
        config = configured(
            folder,
            *("run.steps=2", *UNEVALUATED, f"run.out={folder}/{number}"),
            *(f"recording.rollouts_per_step={asked}", "rollout.student_topk=0"),
            'drift={"metric":"teacher_top_p_accept","k":4}',
        )
        run_through(config)
        found = recorded(config.run.out)
        if asked == 0:
            assert not (config.run.out / "rollouts").exists()
            continue
        assert [table.column("index").to_pylist() for table in found.values()] == [[1, 4], [1, 4]]
        assert found[1].column("student_topk_ids").null_count == 2
    # What is not recorded costs the learner nothing.
    assert noted == [2, 2]


def test_weights_are_kept_of_those_that_are_wanted_and_learnt_from(
    folder: Path, client: InMemoryClient
) -> None:
    from student_trainer.assembly.run import assembled

    config = configured(folder, "optim.epochs=3", "weights.block_gate.block_size=2")
    with assembled(config) as run:
        taken = taken_by(run).rollouts
        noted = TokenWeights({index: taken[index] for index in (1, 4)})
        run.learner.learn(taken, 0, noted)
    found = noted.by_number()
    assert found.keys() == {1, 4}
    for index, weight in found.items():
        assert weight.shape == (len(taken[index]),)
        assert weight.dtype == np.float32
