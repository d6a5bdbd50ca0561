"""Health and metrics: what says how the teacher is, and scores nothing."""

from __future__ import annotations

from fastapi import APIRouter, Response

from teacher_server.http.deps import HttpDeps, not_json
from teacher_server.http.middleware import METRICS_PATH
from teacher_server.metrics.server import CONTENT_TYPE


def routes(deps: HttpDeps) -> APIRouter:
    """/healthz, /readyz and /metrics."""
    router = APIRouter()

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
