"""Token ids as pieces of text: the tokens of one character together, so that no piece is half of
one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from run_report.figures import TokenPieces

TOKENIZER_FILE = "tokenizer.json"


def pieces_of(folder: Path) -> TokenPieces | None:
    """By the tokenizer of a checkpoint's folder; None where it has no tokenizer.json that can be
    read."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises no narrower class.
    except Exception:  # noqa: BLE001 - a report without shades is better than none
        return None
    return lambda ids: pieces(tokenizer, ids)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, str]]:
    """Pieces, each with how many ids it is of; special tokens are shown. An id that the tokenizer
    does not have, and what is left of a character, is U+FFFD."""
    stream = DecodeStream(skip_special_tokens=False)
    found: list[tuple[int, str]] = []
    waiting = 0
    for token_id in ids:
        waiting += 1
        try:
            text = stream.step(tokenizer, token_id)
        # An id out of the vocabulary; the library raises no narrower class.
        except Exception:  # noqa: BLE001
            stream, text = DecodeStream(skip_special_tokens=False), "\ufffd"
        if text:
            found.append((waiting, text))
            waiting = 0
    if waiting:
        found.append((waiting, "\ufffd"))
    return found
