"""Requests and answers of SGLang's /generate. A call has one text or a batch of them; what stands
once in a batch counts for every text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from teacher_server.http.clients.openai_bodies import (
    Flag,
    Id,
    Ids,
    Lenient,
    NumTokens,
    SeveralIds,
    SeveralTexts,
    Temperature,
    Text,
)
from teacher_wire.errors import InvalidRequestError

Start = Annotated[int, Field(strict=True, ge=-1, lt=2**31)]
TopNum = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Choice = Annotated[list[Id], Field(max_length=2**20, fail_fast=True)]
Name = Annotated[str, Field(strict=True, max_length=256)]
PositionIds = Annotated[list[Choice], Field(max_length=2**20, fail_fast=True)]


class SglangSampling(Lenient):
    """What is read of SGLang's sampling parameters."""

    temperature: Temperature | None = None
    max_new_tokens: NumTokens | None = None
    """0 or 1, and either generates nothing."""


class SglangBody(Lenient):
    """One text or several, of which the tokens after logprob_start_len are scored."""

    input_ids: Ids | SeveralIds | None = None
    text: Text | SeveralTexts | None = None
    sampling_params: SglangSampling | list[SglangSampling] | None = None
    return_logprob: Flag | list[Flag] = False
    logprob_start_len: Start | list[Start] | None = None
    """-1 or nothing: only what is generated, which is nothing."""
    top_logprobs_num: TopNum | list[TopNum] | None = None
    token_ids_logprob: Choice | list[Choice | None] | None = None
    """Ids whose log-probs are given at every position."""
    token_ids_logprob_positions: PositionIds | list[PositionIds | None] | None = None
    """Ids of each position from logprob_start_len on, as miles' patch to SGLang has it."""
    return_text_in_logprobs: Flag = False
    rid: Name | list[Name] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of one text."""

    name: str
    """What to call it in a message."""
    given: Any
    """Its ids, or the text."""
    sampling: SglangSampling
    start: int
    """-1: no token of the text."""
    top_num: int
    ids: list[int] | None
    positions: list[list[int]] | None
    rid: str | None


def wanted(body: SglangBody) -> tuple[list[Wanted], bool]:
    """What is asked of each text, and whether the call was a batch. Raises InvalidRequestError."""
    if (body.input_ids is None) == (body.text is None):
        raise InvalidRequestError("exactly one of input_ids and text must be given")
    field, given = ("text", body.text) if body.input_ids is None else ("input_ids", body.input_ids)
    is_batch = isinstance(given, list) and not isinstance(given[0], int)
    texts: list[Any] = list(given) if is_batch else [given]  # type: ignore[arg-type]
    n = len(texts)
    if not all(_each(body.return_logprob, n, "return_logprob")):
        raise InvalidRequestError(
            "return_logprob is false: this teacher scores texts; send true, and logprob_start_len 0"
        )
    columns = (
        [f"{field}[{i}]" for i in range(n)] if is_batch else [field],
        texts,
        _each(body.sampling_params or SglangSampling(), n, "sampling_params"),
        _each(
            -1 if body.logprob_start_len is None else body.logprob_start_len, n, "logprob_start_len"
        ),
        _each(body.top_logprobs_num or 0, n, "top_logprobs_num"),
        _lists(body.token_ids_logprob, n, 1, "token_ids_logprob"),
        _lists(body.token_ids_logprob_positions, n, 2, "token_ids_logprob_positions"),
        _each(body.rid, n, "rid"),
    )
    names = ("name", "given", "sampling", "start", "top_num", "ids", "positions", "rid")
    made = [Wanted(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
    return made, is_batch


def _each(value: Any, n: int, field: str) -> list[Any]:
    """One value a text."""
    if not isinstance(value, list):
        return [value] * n
    if len(value) != n:
        raise InvalidRequestError(
            f"{field} has {len(value)} entries for {n} texts: must have one each"
        )
    return value


def _lists(value: Any, n: int, depth: int, field: str) -> list[Any]:
    """One list, of so many levels, a text; one of no more levels than a text has is for all."""
    if value is None or (_levels(value) <= depth and None not in value):
        return [value] * n
    return _each(value, n, field)


def _levels(value: Any) -> int:
    """Of lists in one another, by the first that is not empty: all are alike."""
    levels = 0
    while isinstance(value, list):
        levels += 1
        present = (inner for inner in value if inner is not None)
        value = next((inner for inner in value if inner), next(present, None))
    return levels


Entry = tuple[float | None, int, str | None]
"""Log-prob, id, text."""


class SglangMeta(BaseModel):
    """What is told of one text."""

    id: str
    finish_reason: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Of which the rows were kept from an earlier call."""
    weight_version: str
    temperature: float
    """At which the text was scored."""
    output_token_logprobs: list[Entry]
    output_token_logprobs_length: int
    input_token_logprobs: list[Entry]
    """One a token from logprob_start_len on; the first has no log-prob."""
    input_top_logprobs: list[list[Entry] | None] | None = None
    input_token_ids_logprobs: list[list[Entry] | None] | None = None


class SglangReply(BaseModel):
    """One text. Nothing was generated."""

    text: Literal[""]
    output_ids: list[int]
    meta_info: SglangMeta
