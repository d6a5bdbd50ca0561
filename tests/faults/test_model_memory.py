"""What a model takes of a GPU's memory, against published models' counts of weights.

Run: python -m pytest tests/faults/test_model_memory.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tracked_files import ROOT
from vllm_process.model_memory import (
    ModelMemoryError,
    kv_bytes_per_token,
    needed_bytes,
    stored_weights_bytes,
    weights_bytes,
)

PLAYGROUND = ROOT / "examples" / "playground" / "checkpoints" / "teacher"


def qwen3(hidden: int, width: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "dtype": "bfloat16",
    } | other


SMALL = qwen3(1024, 3072, 28, 16, tie_word_embeddings=True)
LARGE = qwen3(5120, 25_600, 64, 64)
MIXTURE = qwen3(2048, 6144, 48, 32, model_type="qwen3_moe", num_key_value_heads=4) | {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
LLAMA = qwen3(4096, 14_336, 32, 32, model_type="llama", vocab_size=128_256)
QWEN2 = qwen3(3584, 18_944, 28, 28, model_type="qwen2", vocab_size=152_064, num_key_value_heads=4)
GEMMA2 = qwen3(
    2304, 9216, 26, 8, model_type="gemma2", vocab_size=256_000, num_key_value_heads=4, head_dim=256
)

MODELS = {
    # name: configuration, weights as its publisher counts them, KV bytes a token in bfloat16
    "Qwen3-0.6B": (SMALL, 596_049_920, 114_688),
    "Qwen3-1.7B": (qwen3(2048, 6144, 28, 16, tie_word_embeddings=True), 1_720_574_976, 114_688),
    "Qwen3-8B": (qwen3(4096, 12_288, 36, 32), 8_190_735_360, 147_456),
    "Qwen3-32B": (LARGE, 32_762_123_264, 262_144),
    "Qwen3-30B-A3B": (MIXTURE, 30_532_122_624, 98_304),
    "Llama-3.1-8B": (LLAMA, 8_030_261_248, 131_072),
    "Qwen2.5-7B": (QWEN2, 7_615_616_512, 57_344),
    "Gemma-2-2B": (GEMMA2, 2_614_341_888, 106_496),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_their_published_size(name: str) -> None:
    config, num_weights, token_bytes = MODELS[name]
    assert weights_bytes(config, "auto") == 2 * num_weights
    assert weights_bytes(config, "float32") == 4 * num_weights
    assert kv_bytes_per_token(config, "bfloat16") == token_bytes


def test_a_stored_model_has_the_size_of_its_tensors() -> None:
    config = json.loads((PLAYGROUND / "config.json").read_text())
    raw = (PLAYGROUND / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    assert weights_bytes(config, "auto") == len(raw) - header
    assert stored_weights_bytes(PLAYGROUND) == len(raw)


def test_an_index_of_shards_says_the_size(tmp_path: Path) -> None:
    assert stored_weights_bytes(tmp_path) is None
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"12345")
    assert stored_weights_bytes(tmp_path) == 5
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16_381_470_720}, "weight_map": {}}))
    assert stored_weights_bytes(tmp_path) == 16_381_470_720


def test_latent_attention_keeps_one_vector_on_every_rank() -> None:
    config = {"model_type": "deepseek_v2", "num_hidden_layers": 27, "kv_lora_rank": 512}
    config["qk_rope_head_dim"] = 64
    for ranks in (1, 4):
        size = kv_bytes_per_token(config, "bfloat16", tensor_parallel_size=ranks)
        assert size == 27 * 576 * 2
    with pytest.raises(ModelMemoryError, match="size of its safetensors"):
        weights_bytes(config, "bfloat16")


def test_ranks_share_everything_but_norms() -> None:
    """Qwen3-32B on four GPUs: a quarter of every matrix, all of 64 layers' norms."""
    need = needed_bytes(LARGE, "auto", max_model_len=32_768, tensor_parallel_size=4)
    norms = 64 * (2 * 5120 + 2 * 128) + 5120
    assert need.weights_bytes == 2 * ((32_762_123_264 - norms) // 4 + norms)
    assert need.kv_cache_bytes == 32_768 * 262_144 // 4
    assert need.num_gpus == 4
    assert need.total_bytes > need.weights_bytes + need.kv_cache_bytes


def test_more_ranks_than_key_heads_hold_them_several_times() -> None:
    assert kv_bytes_per_token(MIXTURE, "bfloat16", tensor_parallel_size=8) == 98_304 // 4


def test_stages_share_the_layers_and_a_tied_head_is_held_twice() -> None:
    layer = (596_049_920 - 1024 - 151_936 * 1024) // 28
    need = needed_bytes(SMALL, "bfloat16", max_model_len=4096, pipeline_parallel_size=3)
    # 9, 10 and 9 layers; the table beside the first 9, and beside the last.
    assert need.weights_bytes == 2 * (9 * layer + 151_936 * 1024 + 1024)
    assert need.kv_cache_bytes == 4096 * 10 * 2 * 8 * 128 * 2


def test_the_cache_holds_what_is_asked_or_one_whole_text() -> None:
    small = needed_bytes(SMALL, "auto", max_model_len=4096, num_tokens=100)
    large = needed_bytes(SMALL, "auto", max_model_len=4096, num_tokens=1_000_000)
    assert small.kv_cache_bytes == 4096 * 114_688
    assert large.kv_cache_bytes == 1_000_000 * 114_688


@pytest.mark.parametrize(
    ("config", "dtype", "said"),
    [
        ({**SMALL, "model_type": "novel"}, "auto", "the weights of a novel are not counted"),
        ({**SMALL, "quantization_config": {"quant_method": "fp8"}}, "auto", "quantised"),
        ({**SMALL, "hidden_size": None}, "auto", "hidden_size is None .* AutoConfig"),
        (SMALL, "int3", "dtype 'int3' is not one of float32"),
    ],
)
def test_what_does_not_follow_is_refused(config: dict[str, Any], dtype: str, said: str) -> None:
    with pytest.raises(ModelMemoryError, match=said):
        weights_bytes(config, dtype)


@pytest.mark.parametrize(
    "mixed", [{"layer_types": ["full_attention", "linear_attention"]}, {"attn_layer_period": 8}]
)
def test_layers_that_keep_a_state_are_refused(mixed: dict[str, Any]) -> None:
    with pytest.raises(ModelMemoryError, match="keep a state"):
        kv_bytes_per_token({**SMALL, **mixed}, "bfloat16")


def test_a_tower_around_the_text_is_looked_into() -> None:
    text = {name: value for name, value in SMALL.items() if name != "dtype"}
    around = {"model_type": "seeing", "torch_dtype": "bfloat16", "text_config": text}
    assert kv_bytes_per_token(around, "auto") == 114_688
