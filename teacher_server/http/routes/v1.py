"""What is served, one-shot scoring, analysis. Tokenising and rendering run in threads, because this
loop also carries the gRPC streams."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from teacher_server.http.analysis import Tokenizer, TokenTexts, build_report, report_to_json
from teacher_server.http.bodies import AnalyzeBody, AnalyzeReply, InfoReply, ScoreBody, ScoreReply
from teacher_server.http.deps import HttpDeps
from teacher_server.http.rows import ArrayEncoding, refuse_non_finite, rows_to_json
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import Scores, TokenSpan

MAX_JSON_ENTRIES = 262_144
"""Largest n * K that leaves as JSON numbers; packed arrays have no such limit."""
MAX_REPORT_ENTRIES = 65_536
"""Largest n * K of a report, whose entries are objects."""


def routes(deps: HttpDeps) -> APIRouter:
    """/v1/info, /v1/score and /v1/analyze."""
    router = APIRouter(prefix="/v1", dependencies=deps.token_in_schema())
    texts = TokenTexts(deps.tokenizer)
    tokenizer_turn = deps.tokenizer_turn

    info_reply = InfoReply(**asdict(deps.info), has_tokenizer=deps.tokenizer is not None)

    @router.get("/info", response_model=InfoReply)
    async def info() -> Response:
        """What is served, its limits, and whether texts can be analysed."""
        return _json(asdict(info_reply))

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

    @router.post("/analyze", response_model=AnalyzeReply)
    async def analyze(body: AnalyzeBody, request: Request) -> Response:
        """A table of what the teacher thinks of each response token."""
        deps.refuse_unless_ready()
        async with tokenizer_turn:
            prompt_ids, response_ids = await asyncio.to_thread(_ids_of, body, deps.tokenizer)
        _refuse_too_many(len(response_ids), body.k, MAX_REPORT_ENTRIES)
        span = TokenSpan(
            offset=0,
            token_ids=response_ids,
            candidate_ids=body.candidate_array(),
            event_mask=~np.isin(response_ids, deps.info.special_token_ids),
        )
        policy = body.policy_record()
        scores = await deps.sessions.score_once(
            prompt_ids, span, body.options_record(), policy, tenant=request.state.tenant
        )

        def render() -> Response:
            report = build_report(prompt_ids, response_ids, scores, policy, texts)
            return _json({**report_to_json(report), "timing": asdict(scores.timing)})

        async with tokenizer_turn:
            return await asyncio.to_thread(render)

    return router


def _ids_of(
    body: AnalyzeBody, tokenizer: Tokenizer | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Prompt and response ids. Texts are tokenised apart, as a response never shares a token."""
    prompt_ids, response_ids = body.prompt_ids, body.response_ids
    if tokenizer is None and (prompt_ids is None or response_ids is None):
        raise InvalidRequestError("this teacher has no tokenizer: send token ids instead of text")
    if body.prompt is not None and tokenizer is not None:
        prompt_ids = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    if body.response is not None and tokenizer is not None:
        response_ids = tokenizer.encode(body.response, add_special_tokens=False)
    if not prompt_ids or not response_ids:
        raise InvalidRequestError(
            f"prompt and response have {len(prompt_ids or ())} and {len(response_ids or ())} "
            "tokens, each must have at least 1"
        )
    return np.array(prompt_ids, np.int32), np.array(response_ids, np.int32)


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
