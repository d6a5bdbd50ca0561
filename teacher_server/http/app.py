"""The HTTP side of a teacher: a list of middlewares around groups of routes.

Translates JSON to records and back. Knows no engine, no scheduling and no thresholds; every failure
leaves as {"error": {type, reason, message, ...}} with the status of the error table.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware import Middleware

from teacher_server.http import middleware
from teacher_server.http.bodies import FAILURES
from teacher_server.http.deps import HttpDeps
from teacher_server.http.failures import EXCEPTION_HANDLERS
from teacher_server.http.routes import (
    about,
    analysis,
    openai,
    page,
    plain,
    runs,
    scale_out,
    sglang,
    trl,
    v1,
)
from teacher_wire import __version__

GROUPS = (page, plain, v1, analysis, runs, about, openai, scale_out, sglang, trl)
"""Each gives its `routes(deps)`."""


def middlewares(deps: HttpDeps, max_body_bytes: int) -> list[Middleware]:
    """What every request passes before its route, the outermost first."""
    return [
        Middleware(middleware.Metered, metrics=deps.metrics),
        Middleware(middleware.Named),
        Middleware(middleware.Caught, metrics=deps.metrics),
        Middleware(
            middleware.Authenticated, authenticate=deps.authenticate, open_metrics=deps.open_metrics
        ),
        Middleware(middleware.BodiesInFlight),
        Middleware(middleware.WholeBody, max_bytes=max_body_bytes),
    ]


def create_app(deps: HttpDeps, *, max_body_bytes: int = middleware.MAX_BODY_BYTES) -> FastAPI:
    """The HTTP application of one server."""
    deps.metrics.serving(deps.info)
    # FastAPI's interactive pages load scripts from elsewhere: /docs is ours.
    app = FastAPI(
        title="driftline teacher",
        version=deps.info.server_version or __version__,
        docs_url=None,
        redoc_url=None,
        # A redirect would be made from the Host header, which anybody may send.
        redirect_slashes=False,
        responses=FAILURES,
        exception_handlers=EXCEPTION_HANDLERS,
        middleware=middlewares(deps, max_body_bytes),
    )
    for group in GROUPS:
        app.include_router(group.routes(deps))
    return app
