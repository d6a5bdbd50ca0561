"""What is served, and one-shot scoring. Rendering runs in threads, because this loop also carries
the gRPC streams."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from teacher_server.http.bodies import InfoReply, ScoreBody, ScoreReply
from teacher_server.http.deps import HttpDeps
from teacher_server.http.json_route import JsonRoute
from teacher_server.http.routes.analysis import MAX_JSON_ENTRIES as MAX_ANALYSIS_ENTRIES
from teacher_server.http.rows import ArrayEncoding, refuse_non_finite, rows_to_json
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import Scores

MAX_JSON_ENTRIES = 262_144
"""Largest n * K that leaves as JSON numbers; packed arrays have no such limit."""


def routes(deps: HttpDeps) -> APIRouter:
    """/v1/info and /v1/score."""
    router = APIRouter(prefix="/v1", dependencies=deps.token_in_schema(), route_class=JsonRoute)

    @router.get("/info", response_model=InfoReply)
    async def info(request: Request) -> Response:
        """What is served, its limits, and whether texts can be analysed and runs seen."""
        shows_runs = deps.runs is not None and deps.sees_runs(request.state.tenant)
        reply = InfoReply(
            **asdict(deps.info),
            has_tokenizer=deps.tokenizer is not None,
            shows_runs=shows_runs,
            max_analysis_entries=MAX_ANALYSIS_ENTRIES,
        )
        return _json(asdict(reply))

    @router.post("/score", response_model=ScoreReply)
    async def score(body: ScoreBody, request: Request) -> Response:
        """Teacher scores of one whole response, as nested lists or packed arrays."""
        deps.refuse_unless_ready()
        if body.encoding is ArrayEncoding.JSON:
            _refuse_too_many(len(body.response_ids), body.k, MAX_JSON_ENTRIES)
        scores = await deps.sessions.score_once(
            np.array(body.prompt_ids, np.int32),
            body.span_record(),
            body.options_record(),
            body.policy_record(),
            tenant=request.state.tenant,
        )
        return await asyncio.to_thread(_scores_response, scores, body)

    return router


def _refuse_too_many(num_tokens: int, k: int, limit: int) -> None:
    if num_tokens * k > limit:
        raise InvalidRequestError(
            f"{num_tokens} response tokens x k = {k} is {num_tokens * k} entries, the limit "
            f"of this reply is {limit}: lower k, send less, or use /v1/score with encoding base64"
        )


def _scores_response(scores: Scores, body: ScoreBody) -> Response:
    refuse_non_finite(scores.rows)
    return _json(
        {
            "rows": rows_to_json(scores.rows, body.encoding, body.logprob_dtype),
            "drift": None if scores.drift is None else asdict(scores.drift),
            "verdict": scores.verdict.value,
            "keep_tokens": scores.keep_tokens,
            "timing": asdict(scores.timing),
        }
    )


def _json(content: dict[str, Any]) -> Response:
    """A JSON response. A NaN or an infinity raises, because JSON has no such number."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text, media_type="application/json")
