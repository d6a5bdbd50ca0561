"""What token ids mean: the pairs of id and token, and digests by which two sides compare theirs.

Nothing else of a tokenizer is in here. Merges, normaliser, pre-tokenizer and the flags of special
tokens decide how a text becomes ids, not what an id means; the side that tokenises checks that
(teacher_wire/tokenizer_file.py). Knows a tokenizer only by the one method it calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

BLOCK_IDS = 1024
"""Ids a digest."""
MAX_TOKENS_ASKED = 8 * BLOCK_IDS
"""Ids of one GetTokens call."""
DIGEST_CHARACTERS = 16
"""8 bytes in hex."""


class VocabularyOwner(Protocol):
    """A tokenizer of transformers, as far as it is asked."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of one side. Without tokens it is that of a side that has no tokenizer."""

    tokens: tuple[str | None, ...] = ()
    """By id, up to the largest that has one; None where an id has none."""

    @classmethod
    def of(cls, tokenizer: VocabularyOwner) -> Vocabulary:
        """Added tokens included. Of two tokens with one id the last in the order of text counts."""
        pairs = sorted(tokenizer.get_vocab().items())
        tokens: list[str | None] = [None] * (1 + max((i for _, i in pairs), default=-1))
        for token, token_id in pairs:
            tokens[token_id] = token
        return cls(tokens=tuple(tokens))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the pairs; empty without a token."""
        return _sha256(0, self.tokens) if self.tokens else ""

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """One for every BLOCK_IDS ids from 0 on."""
        starts = range(0, len(self.tokens), BLOCK_IDS)
        blocks = [_sha256(start, self.tokens[start : start + BLOCK_IDS]) for start in starts]
        return tuple(block[:DIGEST_CHARACTERS] for block in blocks)

    @cached_property
    def num_named(self) -> int:
        """Ids that have a token."""
        return sum(token is not None for token in self.tokens)

    def __getitem__(self, token_id: int) -> str | None:
        """The token of an id, None for one that has none."""
        return self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None

    def named(self, first_id: int, count: int) -> dict[int, str]:
        """Ids of a range that have a token, with it."""
        part = self.tokens[first_id : first_id + count]
        return {i: token for i, token in enumerate(part, first_id) if token is not None}


def differing_ranges(own: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """First id and number of ids of the parts where digests differ, each for one GetTokens call."""
    length = max(len(own), len(theirs))
    padded = [[*digests, *[""] * (length - len(digests))] for digests in (own, theirs)]
    parts: list[tuple[int, int]] = []
    for block, (left, right) in enumerate(zip(*padded, strict=True)):
        if left == right:
            continue
        start = block * BLOCK_IDS
        first, count = parts[-1] if parts else (0, 0)
        if parts and first + count == start and count < MAX_TOKENS_ASKED:
            parts[-1] = (first, count + BLOCK_IDS)
        else:
            parts.append((start, BLOCK_IDS))
    return parts


def _sha256(first_id: int, tokens: Sequence[str | None]) -> str:
    pairs = [[i, token] for i, token in enumerate(tokens, first_id) if token is not None]
    text = json.dumps(pairs, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
