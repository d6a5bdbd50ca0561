"""/metrics over HTTP, on a thread of its own and a bounded number more."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from socketserver import BaseServer, TCPServer, ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler

PATH = "/metrics"
MAX_CONNECTIONS = 16
"""At once; one more is closed without an answer."""


class Handler(MetricsHandler):
    """One request, then the connection is closed."""

    timeout = 10.0
    """Seconds that a read or a write may wait."""

    def do_GET(self) -> None:
        if urlsplit(self.path).path != PATH:
            self.send_error(HTTPStatus.NOT_FOUND, explain=f"Metrics are at {PATH}.")
            return
        super().do_GET()


class Server(ThreadingMixIn, TCPServer):
    """A thread for each connection, up to the limit; none keeps the process alive."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Raises OSError where the address cannot be listened on."""
        asked = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = asked[0]
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((str(address[0]), port), Handler.factory(registry))

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            # No thread was started that would give it back.
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is no news in the log of a run; a fault of ours is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextmanager
def answering(host: str, port: int, registry: CollectorRegistry) -> Iterator[None]:
    """Within the block. Raises OSError where the address cannot be listened on."""
    server: BaseServer = Server(host, port, registry)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
