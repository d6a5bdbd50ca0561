"""What names tokens and weights in a handshake and in a record of a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from teacher_wire.errors import InvalidRequestError
from teacher_wire.vocabulary import Vocabulary, VocabularyOwner

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def tokenizer_fingerprint(tokenizer: VocabularyOwner) -> str:
    """SHA-256 (hex) over what the ids mean; empty for a tokenizer without tokens."""
    return Vocabulary.of(tokenizer).fingerprint


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
