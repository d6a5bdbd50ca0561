"""A teacher's client: sessions that survive broken streams, over several replicas, and one-off
questions over HTTP. No torch.

A name is imported when it is asked for: nobody waits for a transport that he does not use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import teacher_wire  # noqa: F401 - it tells gRPC to be quiet, which must come before gRPC

if TYPE_CHECKING:
    from teacher_client.access import AccessError, TeacherAccess
    from teacher_client.client import TeacherClient, TeacherSession
    from teacher_client.http import TeacherHttp
    from teacher_client.retry import RetryLimits
    from teacher_client.teacher import AsyncTeacher, Teacher

__all__ = [
    "AccessError",
    "AsyncTeacher",
    "RetryLimits",
    "Teacher",
    "TeacherAccess",
    "TeacherClient",
    "TeacherHttp",
    "TeacherSession",
]
_MODULES = {
    "AccessError": "access",
    "AsyncTeacher": "teacher",
    "RetryLimits": "retry",
    "Teacher": "teacher",
    "TeacherAccess": "access",
    "TeacherClient": "client",
    "TeacherHttp": "http",
    "TeacherSession": "client",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
