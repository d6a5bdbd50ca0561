"""Rows as vLLM's server writes them: one object a token, keyed by token id.

Legend: n = rows, K = entries besides the actual token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_server.http.clients.asking import LOWEST_LOGPROB
from teacher_server.http.clients.token_strings import TokenStrings
from teacher_wire.records import ModelRows

PIECE_ENTRIES = 8192
"""Entries that are written at a time."""


def ranks_in(token_ids: NDArray[np.int32], rows: ModelRows, width: int) -> NDArray[np.int64]:
    """[n] of the actual tokens: the place among the first `width` of the top-K, else beyond."""
    assert rows.token_ranks is not None
    beyond = np.maximum(rows.token_ranks, width + 1).astype(np.int64)
    if not width or not len(token_ids):
        return beyond
    found = rows.topk_ids[:, :width] == token_ids[:, None]
    return np.where(found.any(axis=1), found.argmax(axis=1) + 1, beyond)


def prompt_logprobs(
    token_ids: NDArray[np.int32], rows: ModelRows, width: int, strings: TokenStrings
) -> Iterator[str]:
    """A JSON array with an entry a token of the text: null for the first, which has no row; then
    the actual token, always first, and the others of the likeliest `width` by rank."""
    yield "[null"
    step = max(1, PIECE_ENTRIES // (width + 1))
    ranks = ranks_in(token_ids[1:], rows, width)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        given = zip(
            token_ids[1:][part].tolist(),
            numbers(rows.token_logprobs[part]),
            ranks[part].tolist(),
            rows.topk_ids[part, :width].tolist(),
            numbers(rows.topk_logprobs[part, :width]),
            strict=True,
        )
        yield "".join(f",{_row(*row, strings)}" for row in given)
    yield "]"


def _row(
    token_id: int,
    logprob: float,
    rank: int,
    top_ids: list[int],
    top_logprobs: list[float],
    strings: TokenStrings,
) -> str:
    entries = [
        f'"{i}":{{"logprob":{value!r},"rank":{place},"decoded_token":{strings[i]}}}'
        for place, (i, value) in enumerate(zip(top_ids, top_logprobs, strict=True), 1)
        if i != token_id
    ]
    own = f'"{token_id}":{{"logprob":{logprob!r},"rank":{rank},'
    own += f'"decoded_token":{strings[token_id]}}}'
    return "{" + ",".join([own, *entries]) + "}"


def numbers(array: NDArray[np.float32]) -> list[Any]:
    """The doubles that log-probs widen to; vLLM's word for minus infinity where one is that."""
    return list(np.maximum(array, LOWEST_LOGPROB).astype(np.float64).tolist())


def openai_logprobs(
    token_ids: NDArray[np.int32],
    rows: ModelRows,
    width: int,
    strings: TokenStrings,
    *,
    as_ids: bool,
) -> dict[str, Any]:
    """The same in OpenAI's form of `echo`: four lists with an entry a token of the text."""
    tokens = [strings.text(i, as_id=as_ids) for i in token_ids.tolist()]
    offsets = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
    logprobs = numbers(rows.token_logprobs)
    likeliest: list[dict[str, float] | None] = [None]
    for token, logprob, ids, values in zip(
        tokens[1:],
        logprobs,
        rows.topk_ids[:, :width].tolist(),
        numbers(rows.topk_logprobs[:, :width]),
        strict=True,
    ):
        others = {
            strings.text(i, as_id=as_ids): value for i, value in zip(ids, values, strict=True)
        }
        likeliest.append({token: logprob} | others)
    return {
        "text_offset": offsets,
        "token_logprobs": [None, *logprobs],
        "tokens": tokens,
        "top_logprobs": likeliest,
    }
