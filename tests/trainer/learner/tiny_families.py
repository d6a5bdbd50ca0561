"""A small random model of each family that the learner is tried on: two layers, float32."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 96
WINDOW = 5
"""Of the sliding attention: shorter than the sequences of the tests."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3Moe",
        EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 4, "router_jitter_noise": 0.1}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
            "layer_types": SLIDING_AND_FULL,
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL},
    ),
    "phi3": ("Phi3", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
    "granite": ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "cohere2": (
        "Cohere2",
        {"logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL},
    ),
    "olmo": ("Olmo", {}),
    # It has no grouped heads; vLLM believes a config that says it has.
    "gpt_neox": (
        "GPTNeoX",
        {"hidden_dropout": 0.1, "attention_dropout": 0.1, "num_key_value_heads": 4},
    ),
}


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """Of a family of FAMILIES."""
    name, own = FAMILIES[family]
    fields = SHAPE | own | changes
    if family == "gemma3":  # with its vision tower around it
        return transformers.Gemma3Config(
            text_config=fields, vision_config=VISION, mm_tokens_per_image=4, image_token_index=95
        )
    prefix = "Gemma3Text" if family == "gemma3_text" else name
    config: transformers.PretrainedConfig = getattr(transformers, f"{prefix}Config")(**fields)
    return config


def tiny_family(family: str, *, seed: int = 0) -> PreTrainedModel:
    """As transformers makes it, dropout and all, in training mode."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
    return model.float().train()
