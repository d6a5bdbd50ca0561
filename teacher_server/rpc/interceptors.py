"""Turns callers away before a message of theirs is decoded. Knows no tenants and no secrets.

Every method of every service passes here, reflection included; only health is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc

from teacher_server.metrics.server import Metrics
from teacher_wire.errors import TeacherError, code_of
from teacher_wire.status import encode_status

Context = grpc.aio.ServicerContext[Any, Any]
OPEN_PREFIX = "/grpc.health.v1.Health/"
_FIRST_MESSAGE_S = 1.0
_MAX_LISTENING = 16
"""Refused streams whose first message is read at once; bounds the memory of strangers."""


def authorization_of(metadata: Any) -> list[str]:
    """The Authorization headers of a call."""
    return [
        value for key, value in metadata or () if key == "authorization" and isinstance(value, str)
    ]


def certificate_name_of(context: Context) -> str | None:
    """Common name of the client's verified certificate, "" if it has none; None: no certificate."""
    properties = context.auth_context()
    if not properties.get("x509_pem_cert"):
        return None
    return next(iter(properties.get("x509_common_name", ())), b"").decode("utf-8", "replace")


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Asks `admit` about the Authorization headers of every call but health."""

    def __init__(self, admit: Callable[[Sequence[str]], object], *, metrics: Metrics) -> None:
        """`admit` raises a TeacherError for callers to turn away."""
        self._admit = admit
        self._metrics = metrics
        self._num_listening = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of the call, or one that refuses it."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if method.startswith(OPEN_PREFIX):
            return handler
        try:
            self._admit(authorization_of(handler_call_details.invocation_metadata))
        except TeacherError as error:
            self._metrics.rpc_started(method)
            self._metrics.rpc(method, code_of(error).grpc, 0.0)
            self._metrics.error(type(error).__name__)
            streams = handler is not None and handler.request_streaming
            return self._refusal(error, streams=streams)
        return handler

    def _refusal(self, error: TeacherError, *, streams: bool) -> Any:
        async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
            # grpc.aio's client forgets a status that arrives while it is writing, so a stream's
            # first message is awaited and dropped, undecoded.
            if streams and self._num_listening < _MAX_LISTENING:
                self._num_listening += 1
                try:
                    await _first(requests)
                finally:
                    self._num_listening -= 1
            await context.abort_with_status(encode_status(error))

        # Fits every method: on the wire a unary call is a stream of one message.
        return grpc.stream_stream_rpc_method_handler(refuse)


async def _first(requests: AsyncIterator[bytes]) -> None:
    reading = asyncio.ensure_future(anext(aiter(requests), None))
    await asyncio.wait({reading}, timeout=_FIRST_MESSAGE_S)
    if not reading.done():
        reading.cancel()
