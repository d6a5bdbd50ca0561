"""Tiny random checkpoints in Hugging Face format, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 512


def write_tiny_model(
    folder: Path, *, seed: int = 0, nan_token_id: int | None = None, vocab_size: int = VOCAB_SIZE
) -> Path:
    """A random float32 Qwen3; with nan_token_id, nothing after that token has finite scores."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            dtype="float32",
        )
    )
    if nan_token_id is not None:
        with torch.no_grad():
            model.model.embed_tokens.weight[nan_token_id] = float("nan")
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """As a file."""
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """<pad>, <eos>, the 256 bytes, then more special tokens: every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet, *more])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", *more])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
