"""vLLM's tokens-in, tokens-out endpoint, which prime-rl scores its rollouts with."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from teacher_server.http.clients import asking, openai_bodies
from teacher_server.http.clients.openai_bodies import GenerateBody, GenerateReply
from teacher_server.http.clients.prompt_logprobs import prompt_logprobs
from teacher_server.http.clients.token_strings import TokenStrings
from teacher_server.http.clients.writing import dumps, json_stream, usage
from teacher_server.http.deps import HttpDeps
from teacher_server.http.json_route import JsonRoute
from teacher_server.scoring.texts import TextScores
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import ScoreOptions


def routes(deps: HttpDeps) -> APIRouter:
    """/inference/v1/generate."""
    router = APIRouter(responses=openai_bodies.FAILURES, route_class=JsonRoute)
    strings = TokenStrings(deps.tokenizer)

    @router.post(
        "/inference/v1/generate",
        response_model=GenerateReply,
        dependencies=deps.token_in_schema(),
    )
    async def generate(body: GenerateBody, request: Request) -> Response:
        """The log-probs of every token of one text, at temperature 1 unless the server is set to
        follow the request's."""
        deps.refuse_unless_ready()
        sampling = body.sampling_params
        asking.refuse_unsupported(body.model_extra)
        asking.refuse_unsupported(sampling.model_extra, "sampling_params.")
        asking.refuse_generating("sampling_params.max_tokens", sampling.max_tokens)
        asking.check_model(body.model, deps)
        if sampling.prompt_logprobs is None:
            raise InvalidRequestError(
                "sampling_params.prompt_logprobs is missing: this teacher scores texts; send it"
            )
        width = asking.width_of(sampling.prompt_logprobs, "prompt logprobs", deps.info)
        token_ids = asking.text_ids(body.token_ids, "token_ids", deps.info)
        asking.refuse_too_many(1, len(token_ids) * (width + 1))
        temperature = asking.scored_at(sampling.temperature, followed=deps.follow_temperature)
        options = ScoreOptions(k=max(width, 1), temperature=temperature, want_rank=True)
        asked = asking.Asked(token_ids=token_ids, options=options)
        (text,) = await asking.score_all(deps, [asked], request.state.tenant)
        await strings.learn(token_ids, text.rows.topk_ids[:, :width])
        request_id = body.request_id or request.state.request_id
        head = _head(request_id, body, token_ids, text, deps.model_name, temperature)
        return json_stream(_reply(head, token_ids, text, width, strings))

    return router


def _head(
    request_id: str,
    body: GenerateBody,
    token_ids: NDArray[np.int32],
    text: TextScores,
    model: str,
    temperature: float,
) -> str:
    choice = {
        "index": 0,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [],
        "logprobs": None,
    }
    return dumps(
        {
            "request_id": request_id,
            "model": model,
            "created": int(time.time()),
            "usage": usage(len(token_ids), text.num_kept),
            "output_mode": "tokens",
            "prompt_token_ids": token_ids.tolist() if body.return_token_ids else None,
            "temperature": temperature,
            "choices": [choice],
        }
    )


def _reply(
    head: str, token_ids: NDArray[np.int32], text: TextScores, width: int, strings: TokenStrings
) -> Iterator[str]:
    yield head[:-1] + ',"prompt_logprobs":'
    yield from prompt_logprobs(token_ids, text.rows, width, strings)
    yield "}"
