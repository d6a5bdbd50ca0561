"""The log-probs of prompts in OpenAI's shape, as `vllm serve` has it: TRL from 1.11 on reads these,
and whatever speaks to a completions endpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from teacher_server.http.clients import asking, openai_bodies
from teacher_server.http.clients.openai_bodies import CompletionBody, CompletionReply
from teacher_server.http.clients.prompt_logprobs import openai_logprobs, prompt_logprobs
from teacher_server.http.clients.token_strings import TokenStrings
from teacher_server.http.clients.writing import dumps, json_stream, usage
from teacher_server.http.deps import HttpDeps
from teacher_server.http.json_route import JsonRoute
from teacher_server.scoring.texts import TextScores
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import ScoreOptions


def routes(deps: HttpDeps) -> APIRouter:
    """/v1/completions."""
    router = APIRouter(responses=openai_bodies.FAILURES, route_class=JsonRoute)
    strings = TokenStrings(deps.tokenizer)

    @router.post(
        "/v1/completions", response_model=CompletionReply, dependencies=deps.token_in_schema()
    )
    async def completions(body: CompletionBody, request: Request) -> Response:
        """The log-probs of every token of one or several prompts."""
        deps.refuse_unless_ready()
        texts = await _texts(body, deps)
        asked = [asking.Asked(token_ids=ids, options=texts.options) for ids in texts.token_ids]
        scores = await asking.score_all(deps, asked, request.state.tenant)
        width = max(texts.prompt_width or 0, texts.width)
        needed = [text.rows.topk_ids[:, :width] for text in scores]
        await strings.learn(*texts.token_ids, *needed)
        reply_id = f"cmpl-{request.state.request_id}"
        return json_stream(_reply(reply_id, body, texts, scores, deps, strings))

    return router


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """What a request comes to."""

    token_ids: list[NDArray[np.int32]]
    given: list[str | None]
    """The texts themselves, where they came as texts."""
    options: ScoreOptions
    prompt_width: int | None
    """Entries a token besides its own in prompt_logprobs; None: not asked for."""
    width: int
    """The same in OpenAI's form; 0 where it is not asked for."""


async def _texts(body: CompletionBody, deps: HttpDeps) -> _Texts:
    """Raises InvalidRequestError for what is not served, and answers 404 for another model."""
    asking.refuse_unsupported(body.model_extra)
    asking.refuse_generating("max_tokens", body.max_tokens)
    asking.check_model(body.model, deps)
    if body.logprobs is not None and not body.echo:
        raise asking.refuse(
            "logprobs", body.logprobs, "without echo it asks for generated tokens: add echo"
        )
    if body.prompt_logprobs is None and body.logprobs is None:
        raise InvalidRequestError(
            "prompt_logprobs is missing: this teacher scores prompts; send prompt_logprobs, or "
            "echo with logprobs"
        )
    prompt_width = None
    if body.prompt_logprobs is not None:
        prompt_width = asking.width_of(body.prompt_logprobs, "prompt logprobs", deps.info)
    width = asking.width_of(body.logprobs or 0, "logprobs", deps.info)
    names, given, prompts = await _prompts(body, deps)
    token_ids = [
        asking.text_ids(ids, name, deps.info) for name, ids in zip(names, prompts, strict=True)
    ]
    entries = (prompt_width or 0) + width + 2
    asking.refuse_too_many(len(token_ids), sum(map(len, token_ids)) * entries)
    options = ScoreOptions(
        k=max(prompt_width or 0, width, 1),
        temperature=asking.scored_at(body.temperature),
        want_rank=True,
    )
    return _Texts(
        token_ids=token_ids, given=given, options=options, prompt_width=prompt_width, width=width
    )


async def _prompts(
    body: CompletionBody, deps: HttpDeps
) -> tuple[list[str], list[str | None], list[list[int]]]:
    """Of each prompt what to call it, its text if it is one, and its token ids."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        several, names = [prompt], ["prompt"]
    else:
        several, names = prompt, [f"prompt[{i}]" for i in range(len(prompt))]
    if isinstance(several[0], str):
        return names, several, await asking.ids_of(several, body.add_special_tokens, deps)
    return names, [None] * len(several), several


def _reply(
    reply_id: str,
    body: CompletionBody,
    texts: _Texts,
    scores: list[TextScores],
    deps: HttpDeps,
    strings: TokenStrings,
) -> Iterator[str]:
    num_tokens = sum(map(len, texts.token_ids))
    head = {
        "id": reply_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": deps.model_name,
        "system_fingerprint": f"driftline-{deps.info.server_version}",
        "temperature": texts.options.temperature,
        "usage": usage(num_tokens, sum(text.num_kept for text in scores)),
        "service_tier": None,
        "kv_transfer_params": None,
        "metrics": None,
    }
    yield dumps(head)[:-1] + ',"choices":['
    for index, (token_ids, text) in enumerate(zip(texts.token_ids, scores, strict=True)):
        yield "," if index else ""
        choice = dumps(_choice(index, body, texts, text, strings))
        yield choice[:-1] + ',"prompt_logprobs":'
        if texts.prompt_width is None:
            yield "null"
        else:
            yield from prompt_logprobs(token_ids, text.rows, texts.prompt_width, strings)
        yield "}"
    yield "]}"


def _choice(
    index: int, body: CompletionBody, texts: _Texts, scores: TextScores, strings: TokenStrings
) -> dict[str, Any]:
    token_ids = texts.token_ids[index]
    ids = token_ids.tolist()
    text, logprobs = "", None
    if body.echo:
        given = texts.given[index]
        text = "".join(map(strings.text, ids)) if given is None else given
    if body.logprobs is not None:
        as_ids = bool(body.return_tokens_as_token_ids)
        logprobs = openai_logprobs(token_ids, scores.rows, texts.width, strings, as_ids=as_ids)
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [] if body.return_token_ids else None,
        "prompt_token_ids": ids if body.return_token_ids else None,
        "routed_experts": None,
    }
