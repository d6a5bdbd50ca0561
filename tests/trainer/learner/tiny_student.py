"""A random two-layer Qwen3 and a tokenizer of single characters, in memory or as a checkpoint."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD_ID, EOS_ID = 0, 1
CHARACTERS = string.digits + string.ascii_lowercase + " #+-*=;>\n①"
VOCAB_SIZE = 2 + len(CHARACTERS)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "dtype": "float32",
}


def tiny_student(
    *, seed: int = 0, tied: bool = False, vocab_size: int = VOCAB_SIZE
) -> Qwen3ForCausalLM:
    """Float32, spread out enough (std 0.2) that its distributions are far from uniform."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = Qwen3Config(**SHAPE | {"tie_word_embeddings": tied, "vocab_size": vocab_size})
    return Qwen3ForCausalLM(config).train()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """<pad>, <eos>, then one id a character of CHARACTERS."""
    tokens = ["<pad>", "<eos>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def write_tiny_student(folder: Path, *, seed: int = 0, tied: bool = False) -> Path:
    """The same as a Hugging Face checkpoint."""
    tiny_student(seed=seed, tied=tied).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder
