"""The arithmetic of the learner's memory: pytest tests/trainer/learner/test_memory.py"""

from __future__ import annotations

import gc
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.models import SHAPES, qwen3_config
from preflight.memory import left_in_control_group
from student_trainer.assembly import from_settings
from student_trainer.errors import ConfigError
from student_trainer.learner.families import decoder_of, without_randomness
from student_trainer.learner.memory import (
    learner_memory,
    parameter_counts,
    refuse_too_large,
)
from student_trainer.settings.config import load_config
from tests.trainer.learner.tiny_families import tiny_config
from tests.trainer.learner.tiny_student import write_tiny_student

ROOT = Path(__file__).resolve().parents[3]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS = 96
BF16 = torch.bfloat16


def qwen3(name: str) -> PretrainedConfig:
    """A published shape, by its name in the benchmarks."""
    return qwen3_config(SHAPES[name])


def kept_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Counted: what the decoder keeps for its backward pass, without the weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(2, config.vocab_size, (1, TOKENS))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False),
    ):
        decoder_of(model)(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3"])
def test_the_formula_is_the_count(family: str, dtype: torch.dtype) -> None:
    config = without_randomness(
        tiny_config(
            family,
            hidden_size=128,
            intermediate_size=384,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=128,
            num_hidden_layers=3,
        )
    )
    options: dict[str, Any] = {
        "dtype": dtype,
        "optimizer": "adamw",
        "tokens": TOKENS,
        "longest": TOKENS,
        "gradient_checkpointing": False,
        "device": CPU,
    }
    formula = learner_memory(config, **options)
    counted = kept_bytes(config, dtype)
    gc.collect()
    # It also has what is under way in a layer's backward pass, half a layer of three, and the
    # rounded weights; families differ by a fifth.
    assert 0.85 <= (formula.activations + formula.rounded_weights) / counted <= 1.75


def test_published_figures_are_met() -> None:
    """Kept a token in float32, in MB, as it was measured on the real shapes."""
    for name, measured in (("qwen3-0.6b", 3.9), ("qwen3-1.7b", 6.0)):
        options: dict[str, Any] = {"optimizer": "adamw", "longest": 4096, "device": CPU}
        found = learner_memory(
            qwen3(name),
            dtype=torch.float32,
            tokens=4096,
            gradient_checkpointing=False,
            **options,
        )
        assert found.activations / 4096 / 1e6 == pytest.approx(measured, rel=0.15)


def test_checkpointing_of_sixteen_thousand_tokens_at_1_7b_is_within_eight_gib() -> None:
    found = learner_memory(
        qwen3("qwen3-1.7b"),
        dtype=BF16,
        optimizer="adamw",
        tokens=16384,
        longest=16384,
        gradient_checkpointing=True,
        device=CUDA,
    )
    assert found.activations + found.rounded_weights + found.head < 8 * 2**30


def test_parameters_are_counted_without_making_them() -> None:
    large = parameter_counts(qwen3("qwen3-8b"))
    assert large.trained == pytest.approx(8.19e9, rel=0.01)
    assert large.trained - large.in_layers == 2 * 151_936 * 4096
    assert large.frozen == 0
    tied = parameter_counts(qwen3("qwen3-0.6b"))
    assert tied.trained - tied.in_layers == 151_936 * 1024


def asked(**changes: Any) -> dict[str, Any]:
    return {
        "where": "cuda:0",
        "dtype": torch.float32,
        "optimizer": "adamw",
        "tokens": 16384,
        "longest": 16384,
        "gradient_checkpointing": False,
        "device": CUDA,
    } | changes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of an 8B model, and no weights."""
    folder = tmp_path_factory.mktemp("Qwen3-8B")
    qwen3("qwen3-8b").save_pretrained(folder)
    return str(folder)


def test_a_student_that_cannot_fit_is_refused_with_the_arithmetic(large: str) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_too_large(large, free_bytes=80e9, **asked())
    text = str(refused.value)
    for part in ("weights 32.8", "gradients 32.8", "optimizer 65.5", "activations", "80.0 GB free"):
        assert part in text
    assert "optim.micro_batch_tokens" in text
    assert "cuda:0" in text


def test_a_student_that_fits_with_checkpointing_alone_is_warned_of(large: str) -> None:
    said = refuse_too_large(large, free_bytes=190e9, **asked())
    assert said is not None
    assert "student.gradient_checkpointing = true" in said
    fits = asked(gradient_checkpointing=True)
    assert refuse_too_large(large, free_bytes=190e9, **fits) is None
    assert refuse_too_large(large, free_bytes=1e12, **asked()) is None


def test_what_cannot_be_read_is_left_to_whoever_loads_it(tmp_path: Path) -> None:
    assert refuse_too_large(str(tmp_path), free_bytes=1.0, **asked()) is None


def test_a_run_is_refused_before_its_student_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_student(tmp_path)
    config = load_config(ROOT / "configs" / "trainer-demo.toml", ["student.device=cpu"])
    assert from_settings.check_student(config, str(tmp_path)) == []
    monkeypatch.setattr(from_settings, "free_memory", lambda device: 1.08e9)
    with pytest.raises(ConfigError, match=r"this machine has 0\.0 GB free"):
        from_settings.check_student(config, str(tmp_path))


def test_memory_of_a_container_is_its_limit(tmp_path: Path) -> None:
    assert left_in_control_group(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\nactive_file 50000\n")
    assert left_in_control_group(tmp_path) == 550_000
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_control_group(tmp_path) == float("inf")


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in (ROOT / "configs").glob("trainer-*.toml")
        if path.name not in ("trainer-demo.toml", "trainer-language.toml")  # for a CPU
    ),
    ids=lambda path: path.name,
)
def test_a_configuration_states_the_memory_of_its_learner(path: Path) -> None:
    model = tomllib.loads(path.read_text(encoding="utf-8"))["student"]["model"]
    config = load_config(path)
    shape = qwen3("qwen3-0.6b" if "0.6B" in model else "qwen3-1.7b")
    found = learner_memory(
        shape,
        dtype=from_settings.dtype(config),
        optimizer=config.optim.kind,
        tokens=max(config.optim.micro_batch_tokens, config.rollout.max_context),
        longest=config.rollout.max_context,
        gradient_checkpointing=config.student.gradient_checkpointing,
        device=CUDA,
    )
    text = " ".join(path.read_text(encoding="utf-8").replace("\n#", "").split())
    assert f"learner {found}" in text
    sampler = config.sampler.gpu_memory_utilization * 80e9  # type: ignore[union-attr]
    assert found.total + sampler < 78e9


def test_the_table_of_the_docs_is_the_arithmetic() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "| adamw" in line]
    assert len(rows) == 12
    for name, dtype, checkpointing, optimizer, *figures in rows:
        found = learner_memory(
            qwen3(name.lower()),
            dtype=getattr(torch, dtype),
            optimizer=optimizer,  # type: ignore[arg-type]
            tokens=16384,
            longest=16384,
            gradient_checkpointing=checkpointing == "yes",
            device=CUDA,
        )
        state = found.weights + found.gradients, found.optimizer
        parts = (*state, found.activations, found.rounded_weights, found.total)
        digits = (0, 1, 1, 1, 0)
        expected = [f"{part / 1e9:.{n}f}" for part, n in zip(parts, digits, strict=True)]
        assert figures == expected, name
