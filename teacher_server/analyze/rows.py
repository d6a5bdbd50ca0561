"""Rollouts from a file: JSON lines, any Parquet file, or one that a trainer recorded.

docs/analyze.md has the columns. A row says what a student was given and what it said, as text or as
ids; the rest is optional, and columns that are not named there are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rollout_records.errors import RecordingError

JSON_LINES, PARQUET = ".jsonl", ".parquet"
ROWS_AT_ONCE = 256
ALIASES = {"candidate_ids": "student_topk_ids", "candidate_logprobs": "student_topk_logprobs"}
"""What recorded rollouts call it."""
MAX_SHOWN = 60
MAX_ID = 2**31 - 1
MAX_LOGPROB = 1e-3
"""Above 0 by what rounding adds."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer used here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One rollout as it was given, as ids."""

    where: str
    """File and line, for messages."""
    prompt: str
    response: str
    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    """[T]"""
    mask: NDArray[np.bool_]
    """[T]"""
    sampled: NDArray[np.bool_] | None
    """[T]"""
    candidate_ids: NDArray[np.int32] | None
    """[T, C]"""
    candidate_logprobs: NDArray[np.float32] | None
    """[T, C]"""
    behavior_logprobs: NDArray[np.float32] | None
    """[T]"""
    others: Mapping[str, Any]
    """Scalars of the recorded schema that were given."""
    loses_text: bool
    """Its text is not what its ids read as."""


def read_rows(
    path: Path, notes: list[str]
) -> Iterator[tuple[str, Mapping[str, Any] | RecordingError]]:
    """File and line (or row) of each, and its columns, or what is wrong with a line that is no JSON
    object. A last line of JSON that is not whole is left out, and told of in `notes`.

    Raises RecordingError naming a file that cannot be read.
    """
    if not path.is_file():
        raise RecordingError(f"{path}: no such file")
    if path.suffix == PARQUET:
        yield from _of_parquet(path)
    elif path.suffix == JSON_LINES:
        yield from _of_json(path, notes)
    else:
        raise RecordingError(f"{path}: must end in {JSON_LINES} or {PARQUET}")


def _of_json(
    path: Path, notes: list[str]
) -> Iterator[tuple[str, Mapping[str, Any] | RecordingError]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    notes.append(f"{where}: the last line is not whole, and left out.")
                    return
                yield where, RecordingError(f"{where}: not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield where, row
            else:
                yield where, RecordingError(f"{where}: must be an object, is {_shown(row)}")


def _of_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", row
                    number += 1
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordingError(
            f"{path}: cut short, or no Parquet file, after {number} rows: {reason}"
        ) from None


OTHERS: dict[str, tuple[type, ...]] = {
    "prompt_id": (str, int),
    "answer": (str, int, float),
    "correct": (bool,),
    "step": (int,),
    "index": (int,),
    "finish": (str,),
    "num_generated": (int,),
    "policy_version": (int,),
}


def given(where: str, row: Mapping[str, Any], tokenizer: Tokenizer | None) -> Given:
    """A row as ids. Raises RecordingError naming row, field, and what it must be."""
    prompt, prompt_ids, lost_prompt = _side(where, row, "prompt", tokenizer)
    response, response_ids, lost_response = _side(where, row, "response", tokenizer)
    num_tokens = len(response_ids)
    if num_tokens == 0:
        raise RecordingError(f"{where}: response has no token, must have at least 1")
    if len(prompt_ids) == 0:
        raise RecordingError(f"{where}: prompt has no token, must have at least 1")
    candidates = _matrix(where, row, "candidate_ids", num_tokens, np.int32)
    logprobs = _matrix(where, row, "candidate_logprobs", num_tokens, np.float32)
    if logprobs is not None and (candidates is None or candidates.shape != logprobs.shape):
        there = "there are none" if candidates is None else f"they are {_size(candidates)}"
        raise RecordingError(
            f"{where}: candidate_logprobs are {_size(logprobs)}, must be one for each of "
            f"candidate_ids, and {there}"
        )
    mask = _vector(where, row, "mask", num_tokens, np.bool_)
    return Given(
        where=where,
        prompt=prompt,
        response=response,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        mask=np.ones(num_tokens, np.bool_) if mask is None else mask,
        sampled=_vector(where, row, "sampled", num_tokens, np.bool_),
        candidate_ids=candidates,
        candidate_logprobs=logprobs,
        behavior_logprobs=_vector(where, row, "behavior_logprobs", num_tokens, np.float32),
        others=_others(where, row),
        loses_text=lost_prompt or lost_response,
    )


def _side(
    where: str, row: Mapping[str, Any], name: str, tokenizer: Tokenizer | None
) -> tuple[str, NDArray[np.int32], bool]:
    """Text, ids, and whether the text is another one than that of the ids."""
    text, ids = row.get(name), row.get(f"{name}_ids")
    if text is None and ids is None:
        raise RecordingError(f"{where}: needs `{name}` or `{name}_ids`, has {sorted(row)}")
    if text is not None and not isinstance(text, str):
        raise RecordingError(f"{where}: {name} must be text, is {_shown(text)}")
    if text is not None:
        _check_text(where, name, text)
    if ids is not None:
        found = _ids(f"{where}: {name}_ids", ids)
        if text is None:
            text = "" if tokenizer is None else tokenizer.decode(found.tolist())
        return text, found, False
    if tokenizer is None:
        raise RecordingError(
            f"{where}: {name} is text, and no tokenizer is known: name one with --tokenizer, or "
            f"give {name}_ids"
        )
    assert isinstance(text, str)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return text, np.array(encoded, np.int32), tokenizer.decode(encoded) != text


def _check_text(where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordingError(
            f"{where}: {name} holds half a character ({text[error.start]!a}, at {error.start}), "
            "must be Unicode: was it cut?"
        ) from None


def _ids(where: str, value: Any) -> NDArray[np.int32]:
    if not isinstance(value, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_ID for i in value
    ):
        raise RecordingError(f"{where} must be a list of token ids, is {_shown(value)}")
    return np.array(value, np.int32)


def _vector(
    where: str, row: Mapping[str, Any], name: str, length: int, kind: type[np.generic]
) -> NDArray[Any] | None:
    """A column of a value a response token; None where it is not there."""
    if (value := row.get(name)) is None:
        return None
    types = (bool,) if kind is np.bool_ else (int, float)
    if (
        not isinstance(value, list)
        or len(value) != length
        or not all(
            isinstance(v, types) and (kind is np.bool_) == isinstance(v, bool) for v in value
        )
    ):
        what = "true or false" if kind is np.bool_ else "numbers"
        raise RecordingError(
            f"{where}: {name} must be a list of {length} {what}, one a response token, is "
            f"{_shown(value)}"
        )
    return _logprobs(where, name, value) if kind is np.float32 else np.array(value, kind)


def _logprobs(where: str, name: str, value: Any) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):
            array = np.array(value).astype(np.float32)
    except OverflowError:
        array = np.full(1, np.inf, np.float32)
    if not np.isfinite(array).all():
        raise RecordingError(
            f"{where}: {name} holds a value that is not finite in 32 bits: leave it out"
        )
    if (high := float(array.max())) > MAX_LOGPROB:
        raise RecordingError(
            f"{where}: {name} holds {high:g}, must be log-probs, at most 0: are they logits?"
        )
    return array


def _matrix(
    where: str, row: Mapping[str, Any], name: str, length: int, kind: type[np.generic]
) -> NDArray[Any] | None:
    """A column of a list a response token, all of one width; None where it is not there."""
    alias = ALIASES[name]
    shown = name if row.get(name) is not None else alias
    if (value := row.get(shown)) is None:
        return None
    try:
        array = np.array(value)
    except ValueError:
        array = np.zeros(0)
    right_kind = array.dtype.kind == "i" if kind is np.int32 else array.dtype.kind in "fi"
    if array.ndim != 2 or len(array) != length or not array.shape[1] or not right_kind:
        what = "token ids" if kind is np.int32 else "numbers"
        raise RecordingError(
            f"{where}: {shown} must be {length} lists of {what}, one a response token and all of "
            f"one length, is {_shown(value)}"
        )
    if kind is np.int32 and (array.min() < 0 or array.max() > MAX_ID):
        raise RecordingError(f"{where}: {shown} spans [{array.min()}, {array.max()}], are no ids")
    return _logprobs(where, shown, array) if kind is np.float32 else array.astype(kind)


def _others(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, types in OTHERS.items():
        value: Any = row.get(name)
        if value is None:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise RecordingError(
                f"{where}: {name} must be {' or '.join(t.__name__ for t in types)}, is "
                f"{_shown(value)}"
            )
        if types == (int,) and not -MAX_ID <= row[name] <= MAX_ID:
            raise RecordingError(f"{where}: {name} is {value}, must have 32 bits")
        found[name] = str(value) if str in types else value
    if "prompt_id" not in found and isinstance(row.get("id"), str | int):
        found["prompt_id"] = str(row["id"])
    for name, value in found.items():
        if isinstance(value, str):
            _check_text(where, name, value)
    return found


def check_fits(row: Given, *, vocab_size: int, max_context: int, max_k: int) -> None:
    """Raises RecordingError for a row that the teacher cannot score, naming field and limit."""
    named: Sequence[tuple[str, NDArray[np.int32] | None]] = (
        ("prompt_ids", row.prompt_ids),
        ("response_ids", row.response_ids),
        ("candidate_ids", row.candidate_ids),
    )
    for name, ids in named:
        if ids is not None and (high := int(ids.max())) >= vocab_size:
            at = tuple(int(i) for i in np.argwhere(ids == high)[0])
            place = "".join(f"[{i}]" for i in at)
            raise RecordingError(
                f"{row.where}: {name}{place} is {high}, the teacher has the ids up to "
                f"{vocab_size - 1}: is it another tokenizer's?"
            )
    length = len(row.prompt_ids) + len(row.response_ids)
    if length > max_context:
        raise RecordingError(
            f"{row.where}: prompt and response have {length} tokens, the teacher takes "
            f"{max_context} (--max-context)"
        )
    if row.candidate_ids is not None and row.candidate_ids.shape[1] > max_k:
        raise RecordingError(
            f"{row.where}: candidate_ids has {row.candidate_ids.shape[1]} a token, the teacher "
            f"takes {max_k}"
        )


def _size(array: NDArray[Any]) -> str:
    return " by ".join(map(str, array.shape))


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
