"""Whole runs with the batched transformers sampler: what is learnt is what the reference gives.

Run: python -m pytest tests/trainer/test_train_batched.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from student_trainer.assembly import from_settings
from student_trainer.assembly.run import assembled
from student_trainer.recording.run_folder import read_record
from student_trainer.rollouts.samplers.hf_batched_sampler import HfBatchedSampler
from student_trainer.rollouts.samplers.replaceable import ReplaceableSampler
from student_trainer.train import train
from tests.trainer.test_train import (
    InMemoryClient,
    configured,
    connect_to,
    prepared,
    records,
    run_through,
)

SHARED, COPIED = (
    f'sampler={{"kind":"hf_batched","weights":"{weights}"}}' for weights in ("shared", "copied")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepared(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [[SHARED], [COPIED], [SHARED, "student.gradient_checkpointing=true"]],
    ids=["shared", "copied", "shared with checkpointing"],
)
def test_a_run_learns_from_the_rollouts_of_the_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """By the same seeds the same tokens, one step after another. 1e-3 of a loss: the second step is
    by weights that one step of AdamW has moved, where a gradient near 0 decides by its sign."""
    lengths = ("run.steps=2", "budget.max_tokens=20")
    connect_to(InMemoryClient(), monkeypatch)
    slow = configured(folder, *lengths, f"run.out={folder}/slow")
    run_through(slow)
    connect_to(InMemoryClient(), monkeypatch)
    fast = configured(folder, *lengths, *overrides)
    run_through(fast)
    steps, expected = records(fast, "step"), records(slow, "step")
    assert len(steps) == 2
    for step, wanted in zip(steps, expected, strict=True):
        assert step["kept_tokens"] == wanted["kept_tokens"]
        assert step["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
        assert step["sync_gap_nats"] < 1e-4
    (start,) = read_record(fast.run.out)["starts"]
    assert start["probe_nats"].keys() == {"plain", "loaded", "changed", "pushed"}
    assert max(start["probe_nats"].values()) < 1e-4
    evals, wanted_evals = records(fast, "eval"), records(slow, "eval")
    assert [e["pass_at_2"] for e in evals if "pass_at_2" in e] == [
        e["pass_at_2"] for e in wanted_evals if "pass_at_2" in e
    ]


def test_a_shared_model_is_loaded_once_and_written_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_to(InMemoryClient(), monkeypatch)

    def refused(*_: object) -> None:
        raise AssertionError("weights were loaded or sent")

    monkeypatch.setattr(HfBatchedSampler, "load_weights", refused)
    monkeypatch.setattr(
        "student_trainer.rollouts.samplers.hf_batched_sampler.load_student", refused
    )
    config = configured(folder, "run.steps=1", 'sampler={"kind":"hf_batched"}')
    with assembled(config) as run:
        assert isinstance(run.running.sampler, ReplaceableSampler)
        assert isinstance(run.running.sampler.present, HfBatchedSampler)
        assert run.running.sampler.present.model is run.learner.lent_model
        train(run)


@pytest.mark.parametrize("given", ["rollout.max_staleness=1", "student.dtype=bfloat16"])
def test_weights_that_cannot_be_shared_are_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    connect_to(InMemoryClient(), monkeypatch)
    config = configured(folder, "run.steps=2", given, 'sampler={"kind":"hf_batched"}')
    assert not from_settings.shares_weights(config)
    run_through(config)
    assert len(records(config, "step")) == 2
