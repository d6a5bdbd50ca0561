"""What must be equal on both sides before any work: the tokens, and the weights.

Knows a tokenizer only by the two methods it calls, so that neither side needs transformers here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from teacher_wire.errors import InvalidRequestError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class BackendTokenizer(Protocol):
    """A `tokenizers.Tokenizer`."""

    def to_str(self) -> str: ...


class FastTokenizer(Protocol):
    """A transformers fast tokenizer."""

    @property
    def backend_tokenizer(self) -> BackendTokenizer: ...

    def get_vocab(self) -> dict[str, int]: ...


def tokenizer_fingerprint(tokenizer: FastTokenizer) -> str:
    """SHA-256 (hex) over the sorted token/id pairs, the merges in order, and the special tokens.

    The chat template, the padding side and names such as `pad_token` stay out: they change no id.
    """
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [
        merge.split(" ", 1) if isinstance(merge, str) else list(merge)
        for merge in state["model"].get("merges") or []
    ]
    special = sorted(
        (token["id"], token["content"])
        for token in state.get("added_tokens") or []
        if token["special"]
    )
    pairs = sorted(tokenizer.get_vocab().items())
    text = json.dumps([pairs, merges, special], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) over name, size and content of a checkpoint's weight files, ordered by name."""
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if not files:
        raise InvalidRequestError(f"{folder} holds no weight file ({', '.join(WEIGHT_SUFFIXES)})")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.name}\0{path.stat().st_size}\0{content}\n".encode())
    return digest.hexdigest()
