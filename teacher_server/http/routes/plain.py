"""Documentation of the API, health, metrics: what says how the teacher is, and scores nothing."""

from __future__ import annotations

import base64
import hashlib
import re

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from teacher_server.http.deps import HttpDeps, not_json
from teacher_server.http.docs_page import docs_page
from teacher_server.http.middleware import METRICS_PATH
from teacher_server.metrics.server import CONTENT_TYPE


def routes(deps: HttpDeps) -> APIRouter:
    """/docs, /healthz, /readyz and /metrics."""
    router = APIRouter()

    docs: list[HTMLResponse] = []

    @router.get("/docs", **not_json("text/html"))
    async def show_docs(request: Request) -> HTMLResponse:
        """Every path, request and answer, on a page that needs nothing else."""
        if not docs:
            made = docs_page(request.app.openapi())
            headers = {"Content-Security-Policy": _content_security_policy(made)}
            docs.append(HTMLResponse(made, headers=headers))
        return docs[0]

    @router.get("/healthz")
    async def liveness() -> dict[str, str]:
        """200 as long as the process answers."""
        return {"status": "alive"}

    @router.get("/readyz")
    async def readiness() -> dict[str, str]:
        """200 when clients should come here, 503 while loading, stalled or draining."""
        deps.refuse_unless_ready()
        return {"status": "ready"}

    token = deps.token_in_schema(needed=not deps.open_metrics)

    @router.get(METRICS_PATH, **not_json("text/plain"), dependencies=token)
    async def prometheus() -> Response:
        """Prometheus text format."""
        return Response(deps.metrics.render(), media_type=CONTENT_TYPE)

    return router


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
