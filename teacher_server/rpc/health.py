"""grpc.health.v1 for one server, all of whose services are ready or not together.

grpc's own servicer holds a lock while it writes to a watcher: one watcher that does not read keeps
every later change from everybody, the drain included. Here a watcher waits for nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from teacher_server.rpc.interceptors import Context

_Status: Any = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers Check, List and Watch. Not serving until told otherwise."""

    def __init__(self, services: Sequence[str]) -> None:
        """`services` are the names that may be asked for; "" stands for the whole server."""
        self._services = frozenset(services)
        self._serving = False
        self._change: asyncio.Future[None] | None = None

    def set(self, serving: bool) -> None:
        """Tells everybody; waits for nobody."""
        if serving == self._serving:
            return
        self._serving = serving
        if self._change is not None:
            self._change.set_result(None)
            self._change = None

    def _of(self, service: str) -> Any:
        if service not in self._services:
            return None
        return _Status.SERVING if self._serving else _Status.NOT_SERVING

    async def Check(self, request: Any, context: Context) -> Any:
        status = self._of(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _Status(status=status)

    async def List(self, request: Any, context: Context) -> Any:
        statuses = {name: _Status(status=self._of(name)) for name in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Context) -> None:
        """The status now, and at every change until the server stops."""
        told = None
        while True:
            status = self._of(request.service)
            if status is None:
                status = _Status.SERVICE_UNKNOWN
            if status != told:
                told = status
                await context.write(_Status(status=status))
                continue
            if self._change is None:
                self._change = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._change)
