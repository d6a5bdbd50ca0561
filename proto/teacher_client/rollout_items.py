"""Rollouts of any form as items of a request, and in batches what came of each. No transport.

A rollout is a text, ids, or a mapping with the names of a request (prompt, messages, prompt_ids,
response, response_ids, candidate_ids) or of recorded rollouts (student_topk_ids). Several come as a
list, or as a table of pandas, polars or pyarrow.
"""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_client.retry import Patience, RetryLimits
from teacher_wire.errors import InvalidRequestError, TeacherError, error_from_json

PROMPT_FORMS = ("prompt_ids", "messages", "prompt")
RESPONSE_FORMS = ("response_ids", "response")
CANDIDATES = ("candidate_ids", "student_topk_ids")
SHARED = ("k", "temperature", "policy", "add_special_tokens", "chat_template_kwargs")
KNOWN = {*PROMPT_FORMS, *RESPONSE_FORMS, *CANDIDATES, *SHARED}
_CHARACTERS_A_TOKEN = 3
"""Of a text of unknown length in tokens."""
RESENDS = "further attempts"
"""What is counted of a request over HTTP, in words."""
MAX_ITEMS, MAX_ENTRIES = 32, 250_000
"""Of one request."""


def rows_of(rollouts: Any) -> list[Mapping[str, Any]]:
    """The rollouts one by one. Raises TypeError for what is none."""
    if isinstance(rollouts, str | Mapping) or _are_ids(rollouts):
        rollouts = [rollouts]
    for method, arguments in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
        if hasattr(rollouts, method):
            rollouts = getattr(rollouts, method)(*arguments)
            break
    return [_row(each) for each in rollouts]


def _row(rollout: Any) -> Mapping[str, Any]:
    if isinstance(rollout, Mapping):
        return rollout
    if isinstance(rollout, str):
        return {"response": rollout}
    if _are_ids(rollout):
        return {"response_ids": rollout}
    raise TypeError(
        f"a rollout is {type(rollout).__name__}, must be a mapping, a text or token ids"
    )


def _are_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], int | np.integer)


def item_of(row: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """One item of a request; what a row has stands before what all have in common."""
    item: dict[str, Any] = {}
    for forms in (PROMPT_FORMS, RESPONSE_FORMS):
        for source in (row, common):
            name = next((n for n in forms if not _is_missing(source.get(n))), None)
            if name is not None:
                item[name] = _plain_ids(source[name]) if name.endswith("_ids") else source[name]
                break
    candidates = next((row[n] for n in CANDIDATES if not _is_missing(row.get(n))), None)
    if candidates is not None:
        item["candidate_ids"] = packed(_matrix(candidates, "candidate_ids", np.int32))
    return item | {name: common[name] for name in SHARED if common.get(name) is not None}


def _is_missing(value: Any) -> bool:
    """None, or the NaN of a table."""
    return value is None or (isinstance(value, float) and value != value)


def _plain_ids(ids: Any) -> list[int]:
    return [int(i) for i in ids]


def _matrix(rows: Any, name: str, dtype: Any) -> NDArray[Any]:
    """[T, C] of lists in lists, however a table nests them. Raises InvalidRequestError."""
    try:
        matrix = np.array([np.asarray(row, dtype) for row in rows], dtype)
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"{name} has rows of different lengths: {error}") from error
    if matrix.ndim != 2:
        raise InvalidRequestError(f"{name} has shape {matrix.shape}, must be [T, C]")
    return matrix


def packed(array: NDArray[np.int32]) -> dict[str, Any]:
    """An array as base64 of its bytes."""
    data = base64.b64encode(np.ascontiguousarray(array, "<i4").tobytes()).decode("ascii")
    return {"dtype": "<i4", "shape": list(array.shape), "data": data}


def num_entries(item: Mapping[str, Any]) -> int:
    """What an item adds to the size of an answer, about."""
    ids = item.get("response_ids")
    text = str(item.get("response") or "")
    length = len(text) // _CHARACTERS_A_TOKEN + 1 if ids is None else len(ids)
    width = item["candidate_ids"]["shape"][1] if "candidate_ids" in item else 0
    return length * (int(item.get("k", 8)) + width)


class Batches:
    """The items of one question in requests of bounded size, and what came of each."""

    def __init__(self, items: Iterable[Mapping[str, Any]], limits: RetryLimits) -> None:
        self._waiting = deque(enumerate(items))
        self._sent: list[tuple[int, Mapping[str, Any]]] = []
        self._alone = 0
        self._patience = Patience(limits, resends=RESENDS)
        self.reports: dict[int, dict[str, Any]] = {}
        """By the number of the item."""
        self.errors: dict[int, TeacherError] = {}
        """Of the items that will not be answered."""

    def next(self) -> dict[str, Any] | None:
        """The next request; None when all items are through."""
        self._sent, entries = [], 0
        most = 1 if self._alone else MAX_ITEMS
        self._alone = max(0, self._alone - 1)
        while self._waiting and len(self._sent) < most:
            entries += num_entries(self._waiting[0][1])
            if self._sent and entries > MAX_ENTRIES:
                break
            self._sent.append(self._waiting.popleft())
        return {"items": [item for _, item in self._sent]} if self._sent else None

    def refuse(self, error: InvalidRequestError) -> None:
        """Takes that the last request was refused whole: its items go again one by one, which tells
        those that are wrong from the others; a single one will not be answered."""
        if len(self._sent) == 1:
            self.errors[self._sent[0][0]] = error
            return
        self._waiting.extendleft(reversed(self._sent))
        self._alone = len(self._sent)

    def take(self, answer: Mapping[str, Any]) -> float:
        """Takes the answer to the last request in; returns the pause before the next one, s."""
        pause_s = 0.0
        for (index, item), found in zip(self._sent, answer["items"], strict=True):
            if "error" not in found:
                self.reports[index] = found
                continue
            error = error_from_json(0, found["error"])
            try:
                pause_s = max(pause_s, self._patience.pause_s(error))
            except TeacherError as final:
                self.errors[index] = final
            else:
                self._waiting.append((index, item))
        return pause_s
