"""What TRL up to 1.10 asks of its own server: log-probs of completions as packed arrays.

Legend: B = texts, T = tokens of the longest completion, K = top-k.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_server.http.clients import asking, openai_bodies
from teacher_server.http.clients.openai_bodies import Id, Lenient, Temperature
from teacher_server.http.clients.paths import TRL_PATH
from teacher_server.http.clients.prompt_logprobs import ranks_in
from teacher_server.http.clients.writing import json_reply
from teacher_server.http.deps import HttpDeps
from teacher_server.http.json_route import JsonRoute
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import ModelRows, ScoreOptions

Text = Annotated[list[Id], Field(fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=asking.MAX_TEXTS, fail_fast=True)]


class SequenceLogprobsBody(Lenient):
    """Texts of which the tokens after the prompt are scored."""

    sequences: Texts
    prompt_lengths: list[Annotated[int, Field(strict=True, ge=0)]]
    top_logprobs: Annotated[int, Field(strict=True, ge=0)] = 100
    temperature: Temperature = 1.0
    response_format: Literal["json", "binary"] = "json"


class SequenceLogprobsReply(BaseModel):
    """Either lists, or base64 of arrays: float32 and int32, little-endian, padded with minus
    infinity and 0 to the longest completion."""

    logprobs: list[list[list[float]]] | None = None
    logprob_token_ids: list[list[list[int]]] | None = None
    logprobs_b64: str | None = None
    token_ids_b64: str | None = None
    actual_logprobs_b64: str | None = None
    actual_token_ids_b64: str | None = None
    shape: list[int] | None = None
    """[B, T, K]"""
    completion_lengths: list[int] | None = None
    temperature: float
    """At which the texts were scored."""


def routes(deps: HttpDeps) -> APIRouter:
    """/get_sequence_logprobs/; /health/ is among the others of its kind."""
    router = APIRouter(responses=openai_bodies.FAILURES, route_class=JsonRoute)

    @router.post(
        TRL_PATH, response_model=SequenceLogprobsReply, dependencies=deps.token_in_schema()
    )
    async def get_sequence_logprobs(body: SequenceLogprobsBody, request: Request) -> Response:
        """The teacher's top-k, and its log-prob of the token itself, of every completion."""
        deps.refuse_unless_ready()
        asked = _asked(body, deps)
        scores = await asking.score_all(deps, asked, request.state.tenant)
        rows = [text.rows for text in scores]
        write = _packed if body.response_format == "binary" else _lists
        reply = await asyncio.to_thread(write, body, rows)
        temperature = asked[0].options.temperature
        return await asyncio.to_thread(json_reply, {**reply, "temperature": temperature})

    return router


def _asked(body: SequenceLogprobsBody, deps: HttpDeps) -> list[asking.Asked]:
    """Raises InvalidRequestError, naming the text."""
    asking.refuse_unsupported(body.model_extra)
    if len(body.sequences) != len(body.prompt_lengths):
        raise InvalidRequestError(
            f"{len(body.sequences)} sequences and {len(body.prompt_lengths)} prompt_lengths: must "
            "have the same length"
        )
    width = asking.width_of(body.top_logprobs, "top_logprobs", deps.info)
    options = ScoreOptions(
        k=max(width, 1), temperature=asking.scored_at(body.temperature), want_rank=True
    )
    asked = []
    for index, (ids, length) in enumerate(zip(body.sequences, body.prompt_lengths, strict=True)):
        if length > len(ids):
            raise InvalidRequestError(
                f"prompt_lengths[{index}] is {length}, must be at most {len(ids)}, the tokens of "
                "its text"
            )
        token_ids = asking.text_ids(ids, f"sequences[{index}]", deps.info)
        asked.append(asking.Asked(token_ids=token_ids, options=options, first_row=max(length, 1)))
    longest = max(len(text.token_ids) for text in asked)
    asking.refuse_too_many(len(asked), len(asked) * longest * (width + 1))
    return asked


def _places(body: SequenceLogprobsBody) -> list[tuple[int, NDArray[np.int32]]]:
    """Of each text the place of the first scored token in its completion, and the scored tokens: a
    completion that begins the text begins with a token that has no row."""
    given = zip(body.sequences, body.prompt_lengths, strict=True)
    return [(int(length == 0), np.array(ids[max(length, 1) :], np.int32)) for ids, length in given]


def _packed(body: SequenceLogprobsBody, rows: list[ModelRows]) -> dict[str, Any]:
    width, places = body.top_logprobs, _places(body)
    lengths = [first + len(ids) for first, ids in places]
    shape = (len(rows), max(lengths), width)
    logprobs = np.full(shape, -np.inf, "<f4")
    token_ids = np.zeros(shape, "<i4")
    actual_logprobs = np.full((*shape[:2], 1), -np.inf, "<f4")
    actual_ids = np.zeros((*shape[:2], 1), "<i4")
    for index, ((first, ids), text) in enumerate(zip(places, rows, strict=True)):
        where = slice(first, first + len(ids))
        logprobs[index, where] = text.topk_logprobs[:, :width]
        token_ids[index, where] = text.topk_ids[:, :width]
        actual_logprobs[index, where, 0] = text.token_logprobs
        actual_ids[index, where, 0] = ids
    return {
        "logprobs_b64": _base64(logprobs),
        "token_ids_b64": _base64(token_ids),
        "actual_logprobs_b64": _base64(actual_logprobs),
        "actual_token_ids_b64": _base64(actual_ids),
        "shape": list(shape),
        "completion_lengths": lengths,
    }


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _lists(body: SequenceLogprobsBody, rows: list[ModelRows]) -> dict[str, Any]:
    """K entries a token by rank, and the token itself after them where it is not among them."""
    all_logprobs, all_ids = [], []
    for (first, token_ids), text in zip(_places(body), rows, strict=True):
        width = body.top_logprobs
        logprobs = np.column_stack([text.topk_logprobs[:, :width], text.token_logprobs]).tolist()
        ids = np.column_stack([text.topk_ids[:, :width], token_ids]).tolist()
        num_entries = np.where(ranks_in(token_ids, text, width) > width, width + 1, width).tolist()
        missing: list[list[Any]] = [[]] * first
        all_logprobs.append(
            missing + [row[:n] for row, n in zip(logprobs, num_entries, strict=True)]
        )
        all_ids.append(missing + [row[:n] for row, n in zip(ids, num_entries, strict=True)])
    return {"logprobs": all_logprobs, "logprob_token_ids": all_ids}
