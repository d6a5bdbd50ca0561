"""Whether a loaded tokenizer gives the ids of the file that it was loaded from.

transformers takes the class that a checkpoint names, and some classes rebuild the tokenizer from
its vocabulary alone: a byte-level one under a name of the Llama family loses every space. Trainer
and teacher both ask here. Knows neither side's libraries; `tokenizers` is imported when it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

log = logging.getLogger(__name__)
PROBES = (
    "What is 12 + 345?\n\nThe cat sat on  the mat.",
    " it's naïve: 東京, Ωμέγα, 🙂",
    "def f(x):\n\treturn {x: [1.5e-3, 'y']}  # done",
)
"""Spaces, lines, digits, punctuation, letters of several scripts."""


class CallableTokenizer(Protocol):
    """A tokenizer of transformers, as far as it is asked."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]: ...


T = TypeVar("T", bound=CallableTokenizer)


class UnfaithfulTokenizerError(ValueError):
    """No class gives the ids of the tokenizer file."""


def faithful(tokenizer: T, file: Path | None, plainly_loaded: Callable[[], T]) -> T:
    """The tokenizer, or the one loaded without a class of its own where only that one is right.

    `file` is its tokenizer.json; None where it has none, which leaves nothing to compare. Where
    both differ from it in the same way, the checkpoint's settings ask for that (`add_prefix_space`
    say), and the tokenizer stays. Raises UnfaithfulTokenizerError naming a text and both ids when
    nothing is right.
    """
    if file is None or (wrong := first_difference(tokenizer, file)) is None:
        return tokenizer
    plain = plainly_loaded()
    still = first_difference(plain, file)
    if still == wrong:
        return tokenizer
    if still is not None:
        raise UnfaithfulTokenizerError(f"{file}: {still} without a class of its own, and {wrong}")
    name = type(tokenizer).__name__
    log.warning("%s: %s as %s; it is loaded without that class", file, wrong, name)
    return plain


def first_difference(tokenizer: CallableTokenizer, file: Path) -> str | None:
    """What differs first from the file, in words; None where no probe does."""
    from tokenizers import Tokenizer

    truth = Tokenizer.from_file(str(file))
    truth.no_truncation()
    truth.no_padding()
    for text in PROBES:
        expected = truth.encode(text, add_special_tokens=False).ids
        found = list(tokenizer.encode(text, add_special_tokens=False))
        if found != expected:
            return f"the text {text!r} has the ids {_cut(expected)} in the file and {_cut(found)}"
    return None


def _cut(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"
