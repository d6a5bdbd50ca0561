"""Random-weight checkpoints in real shapes: speed does not depend on the values.

A checkpoint is made when first asked for and kept below runs/, which git ignores. Its tokenizer has
one word for every id, so that a server which insists on decoding what it returns can.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.provenance import ROOT

if TYPE_CHECKING:
    from transformers import Qwen3Config

FOLDER = ROOT / "runs" / "bench-models"
SHAPE_FILE = "shape.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides the cost of a Qwen3 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 128
    vocab: int = 151_936
    tied: bool = True
    dtype: str = "bfloat16"
    positions: int = 40_960


SHAPES = {
    "tiny": Shape(
        hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256, head_dim=32, vocab=4096
    ),
    "qwen3-0.6b": Shape(hidden=1024, layers=28, heads=16, kv_heads=8, intermediate=3072),
    "qwen3-1.7b": Shape(hidden=2048, layers=28, heads=16, kv_heads=8, intermediate=6144),
    "qwen3-8b": Shape(
        hidden=4096, layers=36, heads=32, kv_heads=8, intermediate=12_288, tied=False
    ),
}


def checkpoint(name: str, folder: Path = FOLDER) -> Path:
    """The folder of a checkpoint in this shape, made now if it is not there."""
    shape, path = SHAPES[name], folder / name
    wanted = json.dumps(asdict(shape), indent=1) + "\n"
    marker = path / SHAPE_FILE
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return path
    partial = folder / f"{name}.partial"
    for old in (partial, path):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_model(shape, partial)
    write_tokenizer(shape.vocab, partial)
    (partial / SHAPE_FILE).write_text(wanted, encoding="utf-8")
    partial.rename(path)
    return path


def qwen3_config(shape: Shape, **others: Any) -> Qwen3Config:
    """A configuration of this shape; other fields as they are named."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        **{"max_position_embeddings": shape.positions, **others},
    )


def _write_model(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = qwen3_config(shape, **ends, dtype=shape.dtype)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    # In its own dtype from the start: a float32 copy of an 8B model would not fit beside it.
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        model = Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """One word for every id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"t{index}" for index in range(2, vocab_size))]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    ).save_pretrained(folder)
