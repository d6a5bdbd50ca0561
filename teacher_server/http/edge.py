"""The outermost layer of the HTTP side: who asks, how much, how many at once, how failures look.

Every failure leaves as {"error": {type, reason, message, retryable, retry_after_ms}} with the
status that teacher_wire.errors gives its class. What goes wrong inside the server is
logged under the request id and leaves as EngineError without its details.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teacher_server import logs
from teacher_server.metrics.server import Metrics
from teacher_wire.errors import (
    CapacityError,
    DeadlineError,
    EngineError,
    InvalidRequestError,
    MessageTooLargeError,
    TeacherError,
    code_of,
    error_to_json,
)

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
BODY_TIMEOUT_S = 30.0
"""A body must have arrived whole after this."""
MAX_BODIES_IN_FLIGHT = 32
"""Requests with a body served at once; with MAX_BODY_BYTES this bounds the memory they hold."""
DEFAULT_TENANT = "http"
"""Tenant of every request when nothing authenticates."""
Authenticate = Callable[[Sequence[str], str | None], str]
"""Authorization headers and common name of the client's certificate ("" if it has none, None
without a certificate) -> tenant. Raises UnauthenticatedError or PermissionDeniedError."""
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
"""Probes, and the page: it is the same for everybody and asks for the token itself."""
METRICS_PATH = "/metrics"

_UNROUTED = "unrouted"
"""Route in the metrics of what no route matches, or what is refused before that is known."""
_CLIENT_LEFT = 499
"""Status in the metrics of a request that got no answer, as proxies write it."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class HttpEdge:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        authenticate: Authenticate | None,
        open_metrics: bool,
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._authenticate = authenticate
        self._open_paths = OPEN_PATHS | {METRICS_PATH} if open_metrics else OPEN_PATHS
        self._max_body_bytes = max_body_bytes
        self._bodies_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        logs.request_id.set(request_id)
        scope.setdefault("state", {}).update(request_id=request_id, metrics=self._metrics)
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    response_headers.setdefault(name, value)
            await send(message)

        try:
            await self._serve(scope, headers, receive, send_noted)
        except Exception as error:  # noqa: BLE001 - the edge: nothing above answers the client
            if not isinstance(error, TeacherError):
                _log.exception("request %s to %s failed", request_id, scope["path"])
            if status == 0:
                response = error_response(error, request_id, self._metrics)
                await response(scope, receive, send_noted)
        finally:
            route = getattr(scope.get("route"), "path", _UNROUTED)
            self._metrics.http(route, status or _CLIENT_LEFT, time.monotonic() - started)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        tenant = DEFAULT_TENANT
        state = scope["state"]
        if self._authenticate is not None and scope["path"] not in self._open_paths:
            name = state.get("certificate_name")
            tenant = self._authenticate(headers.getlist("authorization"), name)
        state["tenant"] = tenant
        logs.tenant.set(tenant)
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        if self._bodies_in_flight >= MAX_BODIES_IN_FLIGHT:
            raise CapacityError(
                f"{self._bodies_in_flight} HTTP requests are in flight, the limit is "
                f"{MAX_BODIES_IN_FLIGHT}",
                retry_after_ms=1000,
            )
        self._bodies_in_flight += 1
        try:
            body = await self._read_body(headers, receive)
            if body is not None:
                await self._answer_while_wanted(scope, body, receive, send)
        finally:
            self._bodies_in_flight -= 1

    async def _answer_while_wanted(
        self, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        """Answers, unless the client leaves first: then the work is cancelled, the engine's too."""
        answer = asyncio.ensure_future(self._app(scope, _replay(body), send))
        departure = asyncio.ensure_future(_departure(receive))
        try:
            await asyncio.wait({answer, departure}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            departure.cancel()
            answer.cancel()
            await asyncio.wait({answer, departure})

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, None if the client left; refuses an announced excess before reading."""
        announced = headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced) > self._max_body_bytes:
            raise MessageTooLargeError(
                f"the body has {announced} bytes, the limit is {self._max_body_bytes}"
            )
        chunks = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks += message.get("body", b"")
                    if len(chunks) > self._max_body_bytes:
                        raise MessageTooLargeError(
                            f"the body has more than {self._max_body_bytes} bytes, the limit"
                        )
                    if not message.get("more_body", False):
                        return bytes(chunks)
        except TimeoutError as error:
            if isinstance(error, TeacherError):
                raise
            raise DeadlineError(f"the body did not arrive within {BODY_TIMEOUT_S} s") from error


def error_response(error: Exception, request_id: str, metrics: Metrics) -> Response:
    """The response of an exception; what is not a TeacherError becomes an EngineError."""
    if isinstance(error, TeacherError) and not isinstance(error, EngineError):
        told: TeacherError = error
    else:
        # The engine's own words (paths, addresses, tensors) are for the log.
        told = EngineError(f"the teacher failed; its log has more under request id {request_id}")
    metrics.error(type(told).__name__)
    return _error_body(code_of(told).http, told)


def _error_body(status: int, told: TeacherError) -> Response:
    content = json.dumps({"error": error_to_json(told)})
    response = Response(content, status, media_type="application/json")
    if told.retry_after_ms > 0:
        response.headers["retry-after"] = str(math.ceil(told.retry_after_ms / 1000))
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _on_teacher_error(request: Request, error: Exception) -> Response:
    if isinstance(error, EngineError):
        _log.error("request %s: engine failed", request.state.request_id, exc_info=error)
    return error_response(error, request.state.request_id, request.state.metrics)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = "; ".join(_problem(detail) for detail in error.errors()[:3])
    return await _on_teacher_error(request, InvalidRequestError(problems))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Routing failures keep their HTTP status: no error class stands for a wrong path or method."""
    assert isinstance(error, HTTPException)
    request.state.metrics.error(InvalidRequestError.__name__)
    told = InvalidRequestError(f"{request.method} {request.url.path}: {error.detail}")
    response = _error_body(error.status_code, told)
    response.headers.update(error.headers or {})
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


def _replay(body: bytes) -> Receive:
    """A receive that gives the body once, then never anything: the edge watches the connection."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _departure(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _request_id(given: str | None) -> str:
    """The client's request id when it is harmless in a log line, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
