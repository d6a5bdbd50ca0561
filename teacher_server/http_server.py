"""uvicorn as one part of a process: no signal handlers of its own, TLS that follows its files."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol


class _Server(uvicorn.Server):
    """The process has one set of signal handlers, in teacher_server.app."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Tells the application whose certificate the client has shown: ASGI has no word for it."""

    app_state: dict[str, Any]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        name = certificate_name(transport.get_extra_info("peercert"))
        self.app_state = {**self.app_state, "certificate_name": name}


def certificate_name(peer_certificate: dict[str, Any] | None) -> str | None:
    """First common name in a verified certificate, "" if it has none; None: no certificate."""
    if not peer_certificate:
        return None
    for part in peer_certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return ""


def http_server(app: Any, context: ssl.SSLContext | None) -> uvicorn.Server:
    """A server of an ASGI application, with TLS when there is a context."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    config.load()
    config.ssl = context
    return _Server(config)
