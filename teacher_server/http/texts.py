"""Between texts and token ids: what a prompt becomes, what each id stands for, and where a text
comes back otherwise. Knows no records and no engine.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from teacher_wire.errors import InvalidRequestError

MAX_POSITIONS = 64
"""Places of a text that a warning names."""
_ANCHOR_CHARACTERS, _WINDOW = 4, 64
"""Two texts are alike again where so many characters are; looked for so far on."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer used here."""

    chat_template: Any
    is_fast: bool
    unk_token: str | None
    unk_token_id: int | None

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool
    ) -> Mapping[str, list[Any]]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The vocabulary entry of an id."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, **kwargs: Any
    ) -> str: ...


_turns: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()


def turn_of(tokenizer: Tokenizer | None) -> threading.Lock:
    """Whoever holds it may ask the tokenizer, which asked from two threads at once may refuse
    ("Already borrowed")."""
    return threading.Lock() if tokenizer is None else _turns.setdefault(tokenizer, threading.Lock())


class TokenTexts:
    """The text that each token id adds to a text, remembered.

    Some decoders strip the space that starts a text, so an id is decoded behind an anchor and the
    anchor is cut off. An id that is only part of a character shows its raw vocabulary entry.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._pairs: dict[int, tuple[str, str]] = {}
        """The id as JSON names a key, and its text."""
        self._without: set[int] = set()
        """Ids that have no text."""
        self._lock = turn_of(tokenizer)
        self._anchor: list[int] = []
        self._anchor_text = ""
        if tokenizer is not None:
            self._anchor = tokenizer.encode("0", add_special_tokens=False)[-1:]
            self._anchor_text = _decode(tokenizer, self._anchor)

    def __getitem__(self, token_id: int) -> str | None:
        """The text, or None without a tokenizer or for an id outside its vocabulary."""
        return self.of([token_id]).get(str(token_id))

    def of(self, ids: Sequence[int]) -> dict[str, str]:
        """The texts of ids, by the id as JSON names a key; without those that have none."""
        pairs = self._pairs
        try:
            return dict(map(pairs.__getitem__, ids))
        except KeyError:
            self._learn([i for i in ids if i not in pairs and i not in self._without])
            return dict(pairs[i] for i in ids if i in pairs)

    def _learn(self, ids: Sequence[int]) -> None:
        if self._tokenizer is None:
            return
        with self._lock:
            for token_id in ids:
                text = self._text(self._tokenizer, token_id)
                if text is None:
                    self._without.add(token_id)
                else:
                    self._pairs[token_id] = (str(token_id), text)

    def _text(self, tokenizer: Tokenizer, token_id: int) -> str | None:
        entry = tokenizer.convert_ids_to_tokens(token_id)
        if entry is None:
            return None
        text = _decode(tokenizer, [*self._anchor, token_id]).removeprefix(self._anchor_text)
        return entry if not text or "\ufffd" in text else text


@dataclass(frozen=True, slots=True, kw_only=True)
class TextWarning:
    """Something about a text that the sender should know."""

    reason: str
    """round_trip: the tokens stand for another text; unknown_text: part of it has no token."""
    field: str
    """Of the request: prompt, messages or response."""
    message: str
    positions: tuple[int, ...]
    """Characters of the text, from 0, at which it comes back otherwise; MAX_POSITIONS at most."""


class Tokenizing:
    """Texts to ids, one at a time."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._lock = turn_of(tokenizer)

    def conversation(self, messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
        """The text that asks for the next message, by the tokenizer's chat template."""
        tokenizer = self._known()
        if not tokenizer.chat_template:
            raise InvalidRequestError(
                "messages: this teacher's tokenizer has no chat template: send prompt instead"
            )
        # Among them a template of the sender's own, which could run for ever.
        own = inspect.signature(tokenizer.apply_chat_template).parameters
        if taken := sorted(set(own) & set(options)):
            raise InvalidRequestError(f"chat_template_kwargs: {', '.join(taken)} may not be given")
        try:
            with self._lock:
                return tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **options
                )
        except (TemplateError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequestError(f"messages: the chat template says: {error}") from error

    def ids(
        self, field: str, text: str, *, add_special_tokens: bool = False
    ) -> tuple[NDArray[np.int32], list[TextWarning]]:
        """The ids of a text, and what is lost on the way."""
        tokenizer = self._known()
        with self._lock:
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
            bare = ids
            if add_special_tokens:
                bare = tokenizer.encode(text, add_special_tokens=False)
            if not ids:
                raise InvalidRequestError(f"{field}: its text has 0 tokens, must have at least 1")
            return np.array(ids, np.int32), _warnings(tokenizer, field, text, bare)

    def _known(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequestError(
                "this teacher has no tokenizer: send prompt_ids and response_ids instead of text"
            )
        return self._tokenizer


def _warnings(tokenizer: Tokenizer, field: str, text: str, ids: list[int]) -> list[TextWarning]:
    back = _decode(tokenizer, ids) if ids else ""
    if text == back:
        return []
    places = _unknown_places(tokenizer, text)
    reason = "unknown_text" if places else "round_trip"
    places = places or differences(text, back)
    count = f"{len(places)} places" if len(places) > 1 else "one place"
    if reason == "unknown_text":
        what = f"has text outside the vocabulary, which the teacher reads as {tokenizer.unk_token}"
    else:
        what = "is not the text that its tokens stand for"
    message = f"{field} {what}: {count}, the first at character {places[0]}"
    return [TextWarning(reason=reason, field=field, message=message, positions=tuple(places))]


def _unknown_places(tokenizer: Tokenizer, text: str) -> list[int]:
    """Characters at which text without a token begins; none where the tokenizer does not tell."""
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places: list[int] = []
    end_before = -1
    for token_id, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if token_id == tokenizer.unk_token_id and text[start:end] != tokenizer.unk_token:
            if start != end_before:
                places.append(start)
            end_before = end
    return places[:MAX_POSITIONS]


def differences(text: str, back: str) -> list[int]:
    """Characters of `text` at which another text begins in `back`, MAX_POSITIONS at most.

    After each the two are followed again from where they are next alike within a window; linear,
    as a text comes from anybody. Where they are never alike again, that place is the last.
    """
    places: list[int] = []
    here = there = 0
    while len(places) < MAX_POSITIONS:
        same = _num_alike(text, back, here, there)
        here, there = here + same, there + same
        if here == len(text) and there == len(back):
            break
        places.append(here)
        step = _alike_again(text, back, here, there)
        if step is None:
            break
        here, there = step
    return places


def _num_alike(text: str, back: str, here: int, there: int) -> int:
    """Characters from here and there on that are the same, by comparing ever smaller halves."""
    low, high = 0, min(len(text) - here, len(back) - there)
    while low < high:
        middle = (low + high + 1) // 2
        if text[here + low : here + middle] == back[there + low : there + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _alike_again(text: str, back: str, here: int, there: int) -> tuple[int, int] | None:
    for skipped in range(_WINDOW):
        anchor = text[here + skipped : here + skipped + _ANCHOR_CHARACTERS]
        if not anchor:
            break
        found = back.find(anchor, there, there + _WINDOW)
        if found >= 0 and (skipped or found > there):
            return here + skipped, found
    return None


def _decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(
        token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
