"""The HTTP side of a teacher: health, metrics, one-shot scoring, analysis, and a page for people.

Translates JSON to records and back. Knows no engine, no scheduling and no thresholds; every failure
leaves as {"error": {type, reason, message, ...}} with the status of the error table.
Tokenising and rendering run in threads, because this loop also carries the gRPC streams.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Protocol

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from numpy.typing import NDArray

from teacher_server.http.analysis import (
    Tokenizer,
    TokenTexts,
    build_report,
    refuse_non_finite,
    report_to_json,
)
from teacher_server.http.bodies import (
    FAILURES,
    AnalyzeBody,
    AnalyzeReply,
    ArrayEncoding,
    InfoReply,
    ScoreBody,
    ScoreReply,
)
from teacher_server.http.edge import (
    EXCEPTION_HANDLERS,
    MAX_BODY_BYTES,
    METRICS_PATH,
    Authenticate,
    HttpEdge,
)
from teacher_server.metrics.server import CONTENT_TYPE, Metrics
from teacher_wire import __version__
from teacher_wire.errors import InvalidRequestError, NotReadyError
from teacher_wire.records import (
    DriftPolicy,
    LogprobDtype,
    ScoreOptions,
    ScoreRows,
    Scores,
    TeacherInfo,
    TokenSpan,
)

MAX_JSON_ENTRIES = 262_144
"""Largest n * K that leaves as JSON numbers; packed arrays have no such limit."""
MAX_REPORT_ENTRIES = 65_536
"""Largest n * K of a report, whose entries are objects."""


class Sessions(Protocol):
    """The part of teacher_server.scoring.sessions.SessionTable used here."""

    async def score_once(
        self,
        prompt_ids: NDArray[np.int32],
        span: TokenSpan,
        options: ScoreOptions,
        policy: DriftPolicy | None,
        *,
        tenant: str,
    ) -> Scores: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpDeps:
    """What the HTTP side is made of."""

    info: TeacherInfo
    sessions: Sessions
    ready: Callable[[], bool]
    """False while loading or draining; must not block."""
    metrics: Metrics
    tokenizer: Tokenizer | None
    """None: texts are refused, token ids still work."""
    authenticate: Authenticate | None = None
    """Who asks, for every path but the open ones of the edge."""
    open_metrics: bool = False
    """/metrics is open too."""


def create_app(deps: HttpDeps, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The HTTP application of one server."""
    deps.metrics.serving(deps.info)
    # FastAPI's interactive pages load scripts from elsewhere, so only the schema is served.
    app = FastAPI(
        title="driftline teacher",
        version=deps.info.server_version or __version__,
        docs_url=None,
        redoc_url=None,
        # A redirect would be made from the Host header, which anybody may send.
        redirect_slashes=False,
        responses=FAILURES,
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.include_router(_plain_routes(deps))
    app.include_router(_v1_routes(deps), dependencies=_bearer(deps.authenticate is not None))
    app.add_middleware(
        HttpEdge,
        metrics=deps.metrics,
        authenticate=deps.authenticate,
        open_metrics=deps.open_metrics,
        max_body_bytes=max_body_bytes,
    )
    return app


def _bearer(needed: bool) -> list[Any]:
    """Has the published schema say that a token is needed; the edge has checked it by then."""
    return [Depends(HTTPBearer(auto_error=False))] if needed else []


def _not_json(media_type: str) -> dict[str, Any]:
    """What the published schema says of a path whose answer is no JSON, though its failures are."""
    return {"response_class": Response, "responses": {200: {"content": {media_type: {}}}}}


def _plain_routes(deps: HttpDeps) -> APIRouter:
    router = APIRouter()
    page = resources.files("teacher_server.http").joinpath("page.html").read_text("utf-8")
    page_headers = {"Content-Security-Policy": _content_security_policy(page)}

    @router.get("/", **_not_json("text/html"))
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    @router.get("/healthz")
    async def liveness() -> dict[str, str]:
        """200 as long as the process answers."""
        return {"status": "alive"}

    @router.get("/readyz")
    async def readiness() -> dict[str, str]:
        """200 when clients should come here, 503 while loading, stalled or draining."""
        _refuse_unless_ready(deps)
        return {"status": "ready"}

    needs_token = deps.authenticate is not None and not deps.open_metrics

    @router.get(METRICS_PATH, **_not_json("text/plain"), dependencies=_bearer(needs_token))
    async def prometheus() -> Response:
        """Prometheus text format."""
        return Response(deps.metrics.render(), media_type=CONTENT_TYPE)

    return router


def _v1_routes(deps: HttpDeps) -> APIRouter:
    router = APIRouter(prefix="/v1")
    texts = TokenTexts(deps.tokenizer)
    # A tokenizer that is asked from two threads at once may refuse ("Already borrowed").
    tokenizer_turn = asyncio.Lock()

    info_reply = InfoReply(**asdict(deps.info), has_tokenizer=deps.tokenizer is not None)

    @router.get("/info", response_model=InfoReply)
    async def info() -> Response:
        """What is served, its limits, and whether texts can be analysed."""
        return _json(asdict(info_reply))

    @router.post("/score", response_model=ScoreReply)
    async def score(body: ScoreBody, request: Request) -> Response:
        """Teacher scores of one whole response, as nested lists or packed arrays."""
        _refuse_unless_ready(deps)
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
        _refuse_unless_ready(deps)
        async with tokenizer_turn:
            prompt_ids, response_ids = await asyncio.to_thread(_ids_of, body, deps.tokenizer)
        _refuse_too_many(len(response_ids), body.k, MAX_REPORT_ENTRIES)
        span = TokenSpan(
            offset=0,
            token_ids=response_ids,
            candidate_ids=body.candidate_array(),
            event_mask=~np.isin(response_ids, deps.info.special_token_ids),
        )
        options = ScoreOptions(
            k=body.k, temperature=body.temperature, want_entropy=True, want_rank=True
        )
        policy = body.policy_record()
        scores = await deps.sessions.score_once(
            prompt_ids, span, options, policy, tenant=request.state.tenant
        )

        def render() -> Response:
            report = build_report(prompt_ids, response_ids, scores, policy, texts)
            return _json({**report_to_json(report), "timing": asdict(scores.timing)})

        async with tokenizer_turn:
            return await asyncio.to_thread(render)

    return router


def _refuse_unless_ready(deps: HttpDeps) -> None:
    if not deps.ready():
        raise NotReadyError("the teacher is loading, stalled or draining", retry_after_ms=1000)


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
            "rows": _rows_to_json(scores.rows, body.encoding, body.logprob_dtype),
            "drift": None if scores.drift is None else asdict(scores.drift),
            "verdict": scores.verdict.value,
            "keep_tokens": scores.keep_tokens,
            "timing": asdict(scores.timing),
        }
    )


def _rows_to_json(rows: ScoreRows, encoding: ArrayEncoding, dtype: LogprobDtype) -> dict[str, Any]:
    logprob_dtype = "<f2" if dtype is LogprobDtype.F16 else "<f4"

    def write(array: NDArray[Any] | None, packed_dtype: str) -> Any:
        if array is None:
            return None
        if encoding is ArrayEncoding.JSON:
            return array.tolist()
        packed = np.ascontiguousarray(array, packed_dtype)
        text = base64.b64encode(packed.tobytes()).decode("ascii")
        return {"dtype": packed_dtype, "shape": list(packed.shape), "data": text}

    return {
        "offset": rows.offset,
        "count": len(rows),
        "k": rows.topk_ids.shape[1],
        "topk_ids": write(rows.topk_ids, "<i4"),
        "topk_logprobs": write(rows.topk_logprobs, logprob_dtype),
        "token_logprobs": write(rows.token_logprobs, logprob_dtype),
        "candidate_logprobs": write(rows.candidate_logprobs, logprob_dtype),
        "overlap_counts": write(rows.overlap_counts, "|u1"),
        "bad_events": write(rows.bad_events, "|b1"),
        "entropies": write(rows.entropies, "<f4"),
        "token_ranks": write(rows.token_ranks, "<i4"),
    }


def _json(content: dict[str, Any]) -> Response:
    """A JSON response. A NaN or an infinity raises, because JSON has no such number."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text, media_type="application/json")


def _content_security_policy(page: str) -> str:
    """Allows exactly the page's own script and style, and requests to this server."""
    sources = {"script": "'none'", "style": "'none'"}
    for tag in sources:
        match = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        if match is not None:
            digest = hashlib.sha256(match[1].encode()).digest()
            sources[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
