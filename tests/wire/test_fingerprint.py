"""Fingerprints see what an id means, and nothing else. Run: pytest tests/wire"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from teacher_wire.errors import InvalidRequestError
from teacher_wire.fingerprint import tokenizer_fingerprint, weights_digest

VOCAB = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "</s>": 5}
MERGES = [("a", "b"), ("b", "c")]


class Fast:
    """The part of a transformers fast tokenizer that is looked at."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special: str | None = "</s>",
    ) -> None:
        self.backend_tokenizer: Any = Tokenizer(BPE(vocab=vocab, merges=merges))
        if special:
            self.backend_tokenizer.add_special_tokens([AddedToken(special, special=True)])

    def get_vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = self.backend_tokenizer.get_vocab()
        return vocab


def test_order_of_the_vocabulary_does_not_matter() -> None:
    shuffled = dict(sorted(VOCAB.items(), reverse=True))
    left, right = tokenizer_fingerprint(Fast(VOCAB, MERGES)), Fast(shuffled, MERGES)
    assert left == tokenizer_fingerprint(right)
    assert len(left) == 64


def test_ids_and_tokens_matter() -> None:
    swapped = {**VOCAB, "a": 1, "b": 0}
    renamed = {("</x>" if token == "</s>" else token): i for token, i in VOCAB.items()}
    prints = {
        tokenizer_fingerprint(Fast(VOCAB, MERGES)),
        tokenizer_fingerprint(Fast(swapped, MERGES)),
        tokenizer_fingerprint(Fast(renamed, MERGES, special="</x>")),
        tokenizer_fingerprint(Fast(VOCAB, MERGES, special="[PAD2]")),
    }
    assert len(prints) == 4


def test_what_makes_ids_of_a_text_does_not_matter() -> None:
    """Merges, what is special, normaliser and pre-tokenizer change no meaning of an id."""
    lower = Fast(VOCAB, MERGES)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    prints = {
        tokenizer_fingerprint(Fast(VOCAB, MERGES)),
        tokenizer_fingerprint(Fast(VOCAB, MERGES[::-1])),
        tokenizer_fingerprint(Fast(VOCAB, MERGES, special=None)),
        tokenizer_fingerprint(lower),
    }
    assert len(prints) == 1


def test_weights_digest_sees_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match="no weight file"):
        weights_digest(tmp_path)
    first = tmp_path / "model.safetensors"
    first.write_bytes(b"1234")
    digest = weights_digest(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert weights_digest(tmp_path) == digest
    first.write_bytes(b"1235")
    changed = weights_digest(tmp_path)
    first.rename(tmp_path / "other.safetensors")
    assert len({digest, changed, weights_digest(tmp_path)}) == 3
