"""A low-rank adapter on a student: what it computes, what is learnt, what stands on disk.

Run: python -m pytest tests/trainer/learner/test_adapter.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.learner.adapter import (
    ADAPTER_FILE,
    ALL_LINEAR,
    CONFIG_FILE,
    Adapter,
    LoraShape,
    adapted,
    check_base,
    config_of,
    new_config,
    num_adapted,
)
from student_trainer.learner.export import exported, tied_names
from student_trainer.records import AS_LEARNT, WeightFormat
from tests.trainer.learner.made_learners import learner_of, optimizer_of
from tests.trainer.learner.tiny_student import SHAPE, tiny_student
from tests.trainer.made_rollouts import random_rollout

IDS = torch.arange(2, 22)[None]
CLOSE = 1e-5
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shape(**changes: Any) -> LoraShape:
    settings: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": ALL_LINEAR, "rslora": False}
    return LoraShape(**(settings | changes))


def with_adapter(model: PreTrainedModel, **changes: Any) -> Adapter:
    """One that is not nought."""
    made = adapted(model, new_config(shape(**changes), "base"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_a_new_adapter_changes_nothing_and_alone_is_learnt() -> None:
    model, plain = tiny_student(), logits(tiny_student())
    made = adapted(model, new_config(shape(), "base"))
    assert torch.equal(logits(model), plain)
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learnt) == 2 * len(NAMES) * 2 == len(made.parameters())
    assert all(".lora_A." in name or ".lora_B." in name for name in learnt)


def test_only_the_adapter_moves_and_the_base_keeps_its_bits() -> None:
    model = tiny_student()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = adapted(model, new_config(shape(), "base"))
    learner = learner_of(model, optimizer_of(model), adapter=made)
    rng = np.random.default_rng(0)
    for step in range(3):
        learner.learn([random_rollout(rng) for _ in range(4)], step)
    after = dict(exported_base(model))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.abs().max() > 0 for p in made.parameters())


def exported_base(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its own tensors, by the names that they have without an adapter."""
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_the_factor_is_alpha_over_rank_or_its_root(rslora: bool) -> None:
    """W x + factor * B A x, by hand, at one layer."""
    model = tiny_student()
    made = with_adapter(model, rank=4, alpha=6.0, targets=("q_proj",), rslora=rslora)
    layer = model.model.layers[0].self_attn.q_proj
    tensors = made.tensors()
    a, b = (
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"]
        for part in "AB"
    )
    x = torch.randn(3, SHAPE["hidden_size"])
    factor = 6.0 / (2.0 if rslora else 4.0)
    expected = x @ layer.base_layer.weight.T + factor * (x @ a.T) @ b.T
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=CLOSE)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_exported_is_the_merged_student(tied: bool) -> None:
    model = tiny_student(tied=tied)
    names = set(model.state_dict())
    with_adapter(model)
    sent = dict(exported(model, AS_LEARNT))
    again = tied_names(model, AS_LEARNT)
    assert sent.keys() | again.keys() == names
    plain = tiny_student(seed=5, tied=tied)
    plain.load_state_dict(sent | {name: sent[first] for name, first in again.items()})
    assert (logits(plain) - logits(model)).abs().max() < CLOSE


def test_merging_leaves_a_bfloat16_base_as_it_was() -> None:
    model = tiny_student().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_adapter(model)
    sent = dict(exported(model, WeightFormat(dtype="bfloat16")))
    after = exported_base(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(tensor.dtype == torch.bfloat16 for tensor in sent.values())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(sent[name], before[name])


def test_what_is_saved_is_what_peft_reads(tmp_path: Path) -> None:
    model = tiny_student()
    learner_of(model, adapter=with_adapter(model, rslora=True)).save(tmp_path)
    read = PeftModel.from_pretrained(tiny_student(), str(tmp_path))
    assert torch.equal(logits(read), logits(model))
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["base_model_name_or_path"] == "base"


def test_what_peft_saved_is_gone_on_from(tmp_path: Path) -> None:
    theirs = get_peft_model(
        tiny_student(), LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False)
    )
    theirs.save_pretrained(str(tmp_path))
    config = config_of(tmp_path)
    config.inference_mode = False
    model = tiny_student()
    made = adapted(model, config)
    made.load(tmp_path)
    assert torch.equal(logits(model), logits(theirs))
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("size", [0.0, 1e-4, 0.2])
def test_every_matrix_is_changed_for_a_proof_and_nothing_else(size: float) -> None:
    """Much enough that a sampler without the change shows, however little was learnt."""
    model = tiny_student()
    made = adapted(model, new_config(shape(), "base"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(size * torch.randn(parameter.shape))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model).log_softmax(-1)
    with made.changed():
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert (logits(model).log_softmax(-1) - plain).abs().max() > 0.5
    assert moved == {name for name in before if ".lora_" in name}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_adapter_alone_is_sent_by_pefts_names() -> None:
    model = tiny_student()
    made = with_adapter(model)
    learner = learner_of(model, adapter=made)
    alone = WeightFormat(dtype="bfloat16", adapter_alone=True)
    sent = dict(learner.weights(alone))
    assert sent.keys() == made.tensors().keys()
    assert all(name.startswith("base_model.model.model.layers.") for name in sent)
    assert learner.export_bytes(alone) == sum(tensor.nbytes for tensor in sent.values())
    assert learner.tied_names(alone) == {}


def test_parameters_are_counted_as_peft_makes_them() -> None:
    for targets in (ALL_LINEAR, ("q_proj", "down_proj")):
        model = tiny_student()
        counted = num_adapted(model, shape(targets=targets), model.get_output_embeddings())
        made = adapted(model, new_config(shape(targets=targets), "base"))
        assert counted == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), r"no layer of the student is called 'q_prj'; .*q_proj"),
        # One that is there does not hide one that is not.
        (("q_proj", "w2"), "no layer of the student is called 'w2'"),
        (("lm_head",), "lm_head would be adapted, and only linear layers below the head"),
        (("embed_tokens",), "embed_tokens would be adapted, and only linear layers"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(tiny_student(), new_config(shape(targets=targets), "base"))


def saved(folder: Path, **changes: Any) -> Path:
    model = tiny_student()
    made = with_adapter(model, **changes)
    made.save(folder, made.tensors())
    return folder


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    def larger() -> PreTrainedModel:
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SHAPE, num_experts=2, num_experts_per_tok=1, mlp_only_layers=[0, 1])
        )

    folder = saved(tmp_path)
    deeper = adapted(larger(), new_config(shape(targets=("q_proj",)), "base"))
    with pytest.raises(CheckpointError, match=r"another base: the student has no .*down_proj"):
        deeper.load(folder)
    narrower = adapted(tiny_student(), new_config(shape(rank=2), "base"))
    with pytest.raises(CheckpointError, match=r"is of \[\d+, \d+\], and the student's of"):
        narrower.load(folder)
    tensors = load_file(folder / ADAPTER_FILE)
    name = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != name}, folder / ADAPTER_FILE)
    with pytest.raises(CheckpointError, match="an adapter without base_model"):
        adapted(tiny_student(), new_config(shape(), "base")).load(folder)


@pytest.mark.parametrize(
    ("base", "is_same"),
    [("some/base", True), ("/models/base", True), ("base", True), ("some/base-instruct", False)],
)
def test_the_base_that_an_adapter_names_must_be_the_student(
    tmp_path: Path, base: str, is_same: bool
) -> None:
    config = config_of(saved(tmp_path))
    if is_same:
        check_base(tmp_path, config, base)
    else:
        with pytest.raises(CheckpointError, match=r'student\.lora\.base_name = "base"'):
            check_base(tmp_path, config, base)


def written(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def gone_on_from(folder: Path) -> None:
    adapted(tiny_student(), config_of(folder)).load(folder)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), f"no {CONFIG_FILE}, not an adapter"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), f"cannot read {CONFIG_FILE}"),
        (lambda f: (f / ADAPTER_FILE).write_bytes(b"xx"), f"cannot read {ADAPTER_FILE}"),
        (lambda f: (f / ADAPTER_FILE).unlink(), f"cannot read {ADAPTER_FILE}"),
        (lambda f: written(f, use_dora=True), r"more than a plain LoRA \(use_dora = True\)"),
        (lambda f: written(f, modules_to_save=["lm_head"]), "modules_to_save = "),
        (lambda f: written(f, bias="all"), "bias = 'all'"),
        (lambda f: written(f, init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (lambda f: written(f, peft_type="IA3"), "not LoRA"),
    ],
)
def test_a_folder_that_is_no_plain_adapter_is_refused(
    tmp_path: Path, broken: Callable[[Path], object], message: str
) -> None:
    broken(saved(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        gone_on_from(tmp_path)


def test_without_peft_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.learner.adapter.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'driftline\[lora\]'"):
        new_config(shape(), "base")
