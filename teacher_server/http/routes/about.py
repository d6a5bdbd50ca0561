"""What clients of `vllm serve` ask before they ask for scores: is it there, what does it serve,
what are the ids of a text."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Response

from teacher_server.http.clients import asking, openai_bodies
from teacher_server.http.clients.openai_bodies import ModelList, TokenizeBody, TokenizeReply
from teacher_server.http.clients.paths import HEALTH_PATHS
from teacher_server.http.clients.token_strings import TokenStrings
from teacher_server.http.clients.writing import json_reply
from teacher_server.http.deps import HttpDeps
from teacher_server.http.json_route import JsonRoute


def routes(deps: HttpDeps) -> APIRouter:
    """/health, /ping, /version, /v1/models and /tokenize."""
    router = APIRouter(responses=openai_bodies.FAILURES, route_class=JsonRoute)
    token = deps.token_in_schema()
    strings = TokenStrings(deps.tokenizer)
    started = int(time.time())

    async def health() -> Response:
        """200 with nothing when clients should come here, else 503."""
        deps.refuse_unless_ready()
        return Response()

    for path in HEALTH_PATHS:
        empty: dict[int | str, Any] = {200: {"description": "Ready; the body is empty."}}
        router.add_api_route(path, health, response_class=Response, responses=empty)

    @router.get("/version", response_model=openai_bodies.Version, dependencies=token)
    async def version() -> Response:
        """Of this server, not of vLLM."""
        return json_reply({"version": deps.info.server_version})

    @router.get("/v1/models", response_model=ModelList, dependencies=token)
    async def models() -> Response:
        """The one model that is served, by the name to ask for it."""
        card = {
            "id": deps.model_name,
            "object": "model",
            "created": started,
            "owned_by": "driftline",
            "root": deps.info.model_id,
            "parent": None,
            "max_model_len": deps.info.max_context,
            "permission": [],
        }
        return json_reply({"object": "list", "data": [card]})

    @router.post("/tokenize", response_model=TokenizeReply, dependencies=token)
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of a text."""
        asking.check_model(body.model, deps)
        ids = (await asking.ids_of([body.prompt], body.add_special_tokens, deps))[0]
        strs = None
        if body.return_token_strs:
            await strings.learn(np.array(ids, np.int32))
            strs = list(map(strings.text, ids))
        counts = {"count": len(ids), "max_model_len": deps.info.max_context}
        return json_reply({**counts, "tokens": ids, "token_strs": strs})

    return router
