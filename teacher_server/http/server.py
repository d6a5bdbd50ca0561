"""uvicorn as one part of a process: no signal handlers of its own, TLS that follows its files, and
no patience with a client that does not read."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol


class _Server(uvicorn.Server):
    """The process has one set of signal handlers, in teacher_server.process.lifecycle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One connection, with what ASGI has no word for: whose certificate the client has shown, and
    that it has stopped reading. uvicorn hands a whole reply to the transport, which would keep it
    for as long as the client keeps the connection."""

    app_state: dict[str, Any]
    transport: asyncio.Transport

    def __init__(
        self, *args: Any, slow_client_s: float, on_slow: Callable[[], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._slow_client_s = slow_client_s
        self._on_slow = on_slow
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        name = certificate_name(transport.get_extra_info("peercert"))
        self.app_state = {**self.app_state, "certificate_name": name}

    def pause_writing(self) -> None:
        """More waits to be sent than the transport likes: the client has a while to take it."""
        super().pause_writing()
        self._timer = asyncio.get_running_loop().call_later(self._slow_client_s, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut(self) -> None:
        self._on_slow()
        self.transport.abort()


def certificate_name(peer_certificate: dict[str, Any] | None) -> str | None:
    """First common name in a verified certificate, "" if it has none; None: no certificate."""
    if not peer_certificate:
        return None
    for part in peer_certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return ""


def http_server(
    app: Any, context: ssl.SSLContext | None, *, slow_client_s: float, on_slow: Callable[[], None]
) -> uvicorn.Server:
    """A server of an ASGI application, with TLS when there is a context. A client that does not
    take a reply in slow_client_s is cut off, and `on_slow` called."""
    protocol: Any = partial(_Protocol, slow_client_s=slow_client_s, on_slow=on_slow)
    config = uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        log_level="warning",  # below are start and end, which the server tells of itself
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    config.load()
    config.ssl = context
    return _Server(config)
