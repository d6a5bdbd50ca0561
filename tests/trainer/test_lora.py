"""Whole runs that train an adapter, with the samplers over transformers and a teacher in memory.

The sampler over vLLM: tests/trainer/rollouts/test_vllm_adapter.py.
Run: python -m pytest tests/trainer/test_lora.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from student_trainer.assembly import adapting, from_settings
from student_trainer.assembly.checkpoint_eval import evaluate_checkpoint
from student_trainer.assembly.run import assembled
from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.pretrained import load_student
from student_trainer.settings.config import TrainerConfig
from student_trainer.train import train
from tests.trainer.test_train import (
    InMemoryClient,
    configured,
    connect_to,
    prepared,
    records,
)

ADAPTER = "adapter_model.safetensors"
LORA = 'student.lora={"rank":4}'
SAMPLERS = {
    "one at a time": 'sampler={"kind":"hf"}',
    "the learner's own model": 'sampler={"kind":"hf_batched","weights":"shared"}',
    "a copy, merged": 'sampler={"kind":"hf_batched","weights":"copied"}',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepared(tmp_path)


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> InMemoryClient:
    made = InMemoryClient()
    connect_to(made, monkeypatch)
    return made


def run_through(config: TrainerConfig, **start: Any) -> dict[str, torch.Tensor]:
    """Trains, and returns the adapter that was saved."""
    with assembled(config, **start) as run:
        train(run)
        run.finish()
    return load_file(config.run.out / "student" / ADAPTER)


def test_a_run_learns_the_same_whatever_samples(folder: Path) -> None:
    losses, saved = {}, {}
    for name, sampler in SAMPLERS.items():
        config = configured(folder, LORA, sampler, "run.steps=6", f"run.out={folder}/{len(saved)}")
        saved[name] = run_through(config)
        steps = records(config, "step")
        losses[name] = [step["loss"] for step in steps]
        assert all(step["sync_gap_nats"] < 1e-4 for step in steps)
    first, *others = losses.values()
    assert first[-1] < first[0]
    for other in others:
        assert other == pytest.approx(first, rel=1e-3)
    assert all(tensors.keys() == saved["one at a time"].keys() for tensors in saved.values())


def test_the_saved_adapter_is_the_learners_in_pefts_own_hands(folder: Path) -> None:
    config = configured(folder, LORA, SAMPLERS["one at a time"], "run.steps=2")
    ids = torch.arange(2, 12)[None]
    with assembled(config) as run:
        train(run)
        run.finish()
        with torch.no_grad():
            expected = run.learner.lent_model(ids).logits
    base = load_student(config.student.model, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        plain = base(ids).logits
        found = PeftModel.from_pretrained(base, str(config.run.out / "student"))(ids).logits
    assert torch.equal(found, expected)
    assert (found - plain).abs().max() > 1e-3
    assert not list((config.run.out / "student").glob("model*.safetensors"))


def test_a_run_that_is_resumed_equals_one_that_was_not(folder: Path) -> None:
    whole = run_through(configured(folder, LORA, f"run.out={folder}/whole"))
    first = configured(folder, LORA)
    with assembled(first) as run:
        train_until(run, 2)
    resumed = run_through(first, resume=True)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def train_until(run: Any, step: int) -> None:
    """As if the run had been killed after so many steps and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        save = run.state.save

        def saved_and_killed() -> None:
            save()
            if run.state.step == step:
                raise KeyboardInterrupt

        patch.setattr(run.state, "save", saved_and_killed)
        with pytest.raises(KeyboardInterrupt):
            train(run)


def test_a_run_goes_on_from_an_adapter_that_is_there(folder: Path) -> None:
    first = configured(folder, LORA, f"run.out={folder}/first")
    before = run_through(first)
    given = json.dumps({"adapter": str(first.run.out / "student")})
    second = configured(folder, f"student.lora={given}", "run.steps=1")
    with assembled(second) as run:
        adapter = run.learner.lent_model.state_dict()
        for name, tensor in before.items():
            own = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            assert torch.equal(adapter[own], tensor)
        train(run)
    assert records(second, "step")[0]["sync_gap_nats"] < 1e-4


def test_an_adapter_is_evaluated_on_its_base(folder: Path) -> None:
    """What the run said of it at its end, whichever way it comes to the sampler."""
    config = configured(folder, LORA, "run.steps=3", "eval.pass_k=0")
    run_through(config)
    (*_, last) = records(config, "eval")
    student = str(config.run.out / "student")
    for sampler in SAMPLERS.values():
        for settings in ([LORA], []):  # with or without the table of the run
            found = evaluate_checkpoint(configured(folder, sampler, *settings), student)
            assert found["heldout_reverse_kl"] == pytest.approx(
                last["heldout_reverse_kl"], rel=1e-4
            )
    base = evaluate_checkpoint(configured(folder, LORA, "eval.pass_k=0"), config.student.model)
    assert base["heldout_reverse_kl"] != pytest.approx(last["heldout_reverse_kl"], rel=1e-2)


def test_a_frozen_base_is_held_in_the_arithmetic_of_the_learner(folder: Path) -> None:
    config = configured(folder, LORA, "student.dtype=bfloat16", "run.steps=2")
    with assembled(config) as run:
        dtypes = {(p.requires_grad, p.dtype) for p in run.learner.lent_model.parameters()}
        assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
        train(run)
    assert len(records(config, "step")) == 2


def test_checkpointing_with_a_frozen_embedding_gives_the_same_gradient(folder: Path) -> None:
    norms = []
    for checkpointing in ("true", "false"):
        given = f"student.gradient_checkpointing={checkpointing}"
        config = configured(folder, LORA, "run.steps=2", given, f"run.out={folder}/{checkpointing}")
        run_through(config)
        norms.append([step["grad_norm"] for step in records(config, "step")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert min(norms[0]) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 4, "adapter": "x"}, r"rank and adapter: an adapter that is there has its own"),
        ({"base_name": "x"}, "base_name without adapter"),
        ({"targets": []}, "targets"),
        ({"rank": 0}, "rank"),
        ({"sync": "adapter"}, r'sync is "adapter", and sampler.kind is "hf"'),
        ({"targets": ["q_prj"]}, "no layer of the student is called 'q_prj'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_asked(
    folder: Path, client: InMemoryClient, given: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_through(configured(folder, f"student.lora={json.dumps(given)}"))
    assert client.sessions == []


def test_an_adapter_of_another_base_is_refused_by_its_name(folder: Path) -> None:
    first = configured(folder, LORA, "run.steps=1", f"run.out={folder}/first")
    run_through(first)
    adapter = first.run.out / "student"
    (folder / "student").rename(folder / "other")
    other = f"student.model={folder}/other"
    given = json.dumps({"adapter": str(adapter)})
    with pytest.raises(CheckpointError, match=r"an adapter of .*student, and the student is"):
        run_through(configured(folder, other, f"student.lora={given}"))
    named = json.dumps({"adapter": str(adapter), "base_name": str(folder / "student")})
    run_through(configured(folder, other, f"student.lora={named}", "run.steps=1"))


def test_without_an_adapter_nothing_of_it_is_asked(folder: Path) -> None:
    config = configured(folder)
    assert adapting.lora_config(config) is None
    assert adapting.in_vllm(config) is None
    assert adapting.shape_of(config) is None


@pytest.mark.parametrize(
    ("sync", "dtype", "on_gpu", "alone"),
    [
        ("auto", "float32", False, False),
        ("auto", "bfloat16", False, True),
        ("auto", "float32", True, False),
        ("auto", "bfloat16", True, True),
        ("adapter", "float32", False, True),
        ("merged", "bfloat16", True, False),
    ],
)
def test_vllm_has_the_adapter_beside_its_base_where_that_is_faster_or_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sync: str, dtype: str, on_gpu: bool, alone: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    lora = json.dumps({"rank": 9, "sync": sync})
    config = configured(
        folder, f"student.lora={lora}", f"student.dtype={dtype}", 'sampler={"kind":"vllm"}'
    )
    found = adapting.in_vllm(config)
    assert (found is not None) is alone
    assert from_settings.weight_format(config).adapter_alone is alone
    assert from_settings.weight_format(config).as_saved is not alone


def test_an_adapter_in_float32_beside_its_base_on_a_gpu_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lora = json.dumps({"rank": 9, "sync": "adapter"})
    config = configured(folder, f"student.lora={lora}", 'sampler={"kind":"vllm"}')
    with pytest.raises(ConfigError, match=r"take 16 bits, sampler.dtype is float32: \"merged\""):
        adapting.in_vllm(config)
