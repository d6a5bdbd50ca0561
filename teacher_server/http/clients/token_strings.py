"""What token ids say, as JSON strings, ready to be written into an answer of many thousands."""

from __future__ import annotations

import asyncio
import json

import numpy as np
from numpy.typing import NDArray

from teacher_server.http.texts import Tokenizer, TokenTexts


class TokenStrings:
    """JSON of the text of each token, remembered; "null" where there is none.

    An id has to be learnt before it is asked for; then answers are written without the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._texts = TokenTexts(tokenizer)
        self._has_tokenizer = tokenizer is not None
        self._json: dict[int, str] = {}

    async def learn(self, *arrays: NDArray[np.int32]) -> None:
        """Asks the tokenizer for the ids that are new."""
        if not self._has_tokenizer:
            return
        ids = {token_id for array in arrays for token_id in np.unique(array).tolist()}
        if new := ids - self._json.keys():
            await asyncio.to_thread(self._ask, new)

    def _ask(self, new: set[int]) -> None:
        texts = self._texts.of([*new])
        for token_id in new:
            text = json.dumps(texts.get(str(token_id)), ensure_ascii=False)
            self._json[token_id] = text

    def __getitem__(self, token_id: int) -> str:
        """JSON: a string, or null."""
        return self._json.get(token_id, "null")

    def text(self, token_id: int, *, as_id: bool = False) -> str:
        """The text itself; as OpenAI's form has no null, "token_id:N" where there is none, or on
        request."""
        told = None if as_id else json.loads(self[token_id])
        return f"token_id:{token_id}" if told is None else told
