"""What every HTTP request passes before its route, one thing each, in the order of
teacher_server.http.app: counted, named, caught, authenticated, admitted, read.

Knows no route but the paths that are open.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teacher_server import logs
from teacher_server.access.caller import UNAUTHENTICATED_HTTP_TENANT, Caller, TenantOf
from teacher_server.http.clients.paths import HEALTH_PATHS
from teacher_server.http.failures import error_response
from teacher_server.metrics.server import Metrics
from teacher_wire.errors import CapacityError, DeadlineError, MessageTooLargeError, TeacherError

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
BODY_TIMEOUT_S = 30.0
"""A body must have arrived whole after this."""
MAX_BODIES_IN_FLIGHT = 32
"""Requests with a body served at once; with MAX_BODY_BYTES this bounds the memory they hold."""
OPEN_PATHS = frozenset({"/", "/docs", "/healthz", "/readyz", *HEALTH_PATHS})
"""Probes, and pages that are the same for everybody: the one at / asks for the token itself."""
PAGE_FILES = "/page/"
"""What the page is made of: open like the page, all that is below."""
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


def is_open(path: str) -> bool:
    """Whether a path is anybody's to ask for, whatever the settings."""
    return path in OPEN_PATHS or path.startswith(PAGE_FILES)


class _Middleware:
    """Around an application: `request` sees HTTP, anything else goes by."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serve = self.request if scope["type"] == "http" else self._app
        await serve(scope, receive, send)

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class _WithBody(_Middleware):
    """One that GET and HEAD go by too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        without = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        serve = self._app if without else super().__call__
        await serve(scope, receive, send)


class Metered(_Middleware):
    """Counts every request by route and status, with its duration."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        super().__init__(app)
        self._metrics = metrics

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = time.monotonic(), _CLIENT_LEFT

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", _UNROUTED)
            self._metrics.http(route, status, time.monotonic() - started)


class Named(_Middleware):
    """Gives it an id, in the log and on the reply: the client's when that is harmless in a log
    line, else a new one."""

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        logs.request_id.set(request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        headers = {**_HEADERS, "x-request-id": request_id}

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply = MutableHeaders(scope=message)
                for name, value in headers.items():
                    reply.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, named)


class Caught(_Middleware):
    """Answers for whatever is raised within; nothing above does."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        super().__init__(app)
        self._metrics = metrics

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, begun = scope["state"]["request_id"], False
        scope["state"]["metrics"] = self._metrics

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:  # noqa: BLE001 - nothing above answers the client
            if not isinstance(error, TeacherError):
                _log.exception("request %s to %s failed", request_id, scope["path"])
            if not begun:
                answer = error_response(error, request_id, self._metrics, scope["path"])
                await answer(scope, receive, send)


class Authenticated(_Middleware):
    """Finds whose it is."""

    def __init__(self, app: ASGIApp, *, authenticate: TenantOf | None, open_metrics: bool) -> None:
        super().__init__(app)
        self._authenticate = authenticate
        self._open_metrics = open_metrics

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = UNAUTHENTICATED_HTTP_TENANT
        if self._authenticate is not None and not self._is_open(scope["path"]):
            tenant = self._authenticate(
                Caller(
                    authorization=Headers(scope=scope).getlist("authorization"),
                    certificate_name=scope["state"].get("certificate_name"),
                    claimed=tenant,
                )
            )
        scope["state"]["tenant"] = tenant
        logs.tenant.set(tenant)
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return is_open(path) or (self._open_metrics and path == METRICS_PATH)


class BodiesInFlight(_WithBody):
    """Turns a body away when as many are being served as memory is meant for."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app)
        self._num = 0

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._num >= MAX_BODIES_IN_FLIGHT:
            raise CapacityError(
                f"{self._num} HTTP requests are in flight, the limit is {MAX_BODIES_IN_FLIGHT}",
                retry_after_ms=1000,
            )
        self._num += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num -= 1


class WholeBody(_WithBody):
    """Reads the body to its end, then answers unless the client leaves first: then the work is
    cancelled, the engine's too."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        super().__init__(app)
        self._max_bytes = max_bytes

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._read(Headers(scope=scope), receive)
        if body is None:
            return
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

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, None if the client left; refuses an announced excess before reading."""
        announced = headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced) > self._max_bytes:
            raise MessageTooLargeError(
                f"the body has {announced} bytes, the limit is {self._max_bytes}"
            )
        chunks = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks += message.get("body", b"")
                    if len(chunks) > self._max_bytes:
                        raise MessageTooLargeError(
                            f"the body has more than {self._max_bytes} bytes, the limit"
                        )
                    if not message.get("more_body", False):
                        return bytes(chunks)
        except TimeoutError as error:
            if isinstance(error, TeacherError):
                raise
            raise DeadlineError(f"the body did not arrive within {BODY_TIMEOUT_S} s") from error


def _replay(body: bytes) -> Receive:
    """A receive that gives the body once, then never anything: the connection is watched above."""
    pending = [body]

    async def receive() -> Message:
        if not pending:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": pending.pop(), "more_body": False}

    return receive


async def _departure(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
