"""What a transport knows of whoever calls, and the tenants of those whom nobody authenticates. Each
transport makes a Caller in one place; teacher_server.access.auth finds its tenant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

UNAUTHENTICATED_GRPC_TENANT = "default"
"""Tenant of gRPC without authentication and without a run_id."""
UNAUTHENTICATED_HTTP_TENANT = "http"
"""Tenant of HTTP without authentication."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who a call says that it is from."""

    authorization: Sequence[str]
    """Its Authorization headers."""
    certificate_name: str | None
    """Common name of its verified certificate, "" if that has none; None: no certificate."""
    claimed: str
    """Its tenant where nobody is authenticated."""


TenantOf = Callable[[Caller], str]
"""The tenant of a caller. Raises UnauthenticatedError or PermissionDeniedError."""
