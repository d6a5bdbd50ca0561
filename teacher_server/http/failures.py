"""How a failure leaves over HTTP: {"error": {type, reason, message, retryable, retry_after_ms}},
with the status that teacher_wire.errors gives its class; on the paths of other trainers' clients in
the shape that these read. What goes wrong inside the server is logged under the request id and
leaves as EngineError without its details.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from teacher_server.http.clients.paths import CHALLENGE, SHAPED_PATHS, shaped_error
from teacher_server.metrics.server import Metrics
from teacher_wire.errors import (
    EngineError,
    InvalidRequestError,
    TeacherError,
    code_of,
    error_to_json,
)

_log = logging.getLogger(__name__)


def told_of(error: Exception, request_id: str) -> TeacherError:
    """What a client is told; what is not a TeacherError becomes an EngineError."""
    if isinstance(error, TeacherError) and not isinstance(error, EngineError):
        return error
    # The engine's own words (paths, addresses, tensors) are for the log.
    return EngineError(f"the teacher failed; its log has more under request id {request_id}")


def error_response(error: Exception, request_id: str, metrics: Metrics, path: str) -> Response:
    """The response of an exception on a path."""
    told = told_of(error, request_id)
    metrics.error(type(told).__name__)
    return _error_body(code_of(told).http, told, path)


def item_failure(request: Request, error: TeacherError) -> dict[str, object]:
    """A failure inside an answer that is otherwise good, counted and logged as any other."""
    state = request.state
    if isinstance(error, EngineError):
        _log.error("request %s: engine failed", state.request_id, exc_info=error)
    told = told_of(error, state.request_id)
    state.metrics.error(type(told).__name__)
    return {"error": error_to_json(told)}


def _error_body(status: int, told: TeacherError, path: str) -> Response:
    is_shaped = path in SHAPED_PATHS
    content = shaped_error(status, told.message) if is_shaped else {"error": error_to_json(told)}
    response = Response(json.dumps(content), status, media_type="application/json")
    if told.retry_after_ms > 0:
        response.headers["retry-after"] = str(math.ceil(told.retry_after_ms / 1000))
    if status == 401:
        response.headers["www-authenticate"] = CHALLENGE if is_shaped else "Bearer"
    return response


async def _on_teacher_error(request: Request, error: Exception) -> Response:
    if isinstance(error, EngineError):
        _log.error("request %s: engine failed", request.state.request_id, exc_info=error)
    state = request.state
    return error_response(error, state.request_id, state.metrics, request.url.path)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = "; ".join(_problem(detail) for detail in error.errors()[:3])
    return await _on_teacher_error(request, InvalidRequestError(problems))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Routing failures keep their HTTP status: no error class stands for a wrong path or method."""
    assert isinstance(error, HTTPException)
    request.state.metrics.error(InvalidRequestError.__name__)
    path = request.url.path
    where = "" if path in SHAPED_PATHS else f"{request.method} {path}: "
    response = _error_body(error.status_code, InvalidRequestError(where + error.detail), path)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        # Starlette names those of one route; a path may have a route for each of its methods.
        routes = [route for route in request.app.routes if route.path == path]
        methods = {method for route in routes for method in route.methods}
        response.headers["allow"] = ", ".join(sorted(methods))
    return response


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[..., Any]] = {
    TeacherError: _on_teacher_error,
    RequestValidationError: _on_invalid_body,
    HTTPException: _on_http_exception,
}


def _problem(detail: dict[str, Any]) -> str:
    """One validation problem: where, what, and the value when it is a short scalar."""
    where = ".".join(str(part) for part in detail["loc"])
    value = detail.get("input")
    short = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 32)
    got = f", got {value!r}" if short else ""
    return f"{where}: {detail['msg']}{got}"
