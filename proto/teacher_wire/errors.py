"""The error tree of the service, and the one table to gRPC and HTTP codes.

TeacherError
├── InvalidRequestError      bad ids, shapes, k or length; the message names value and limit
├── FingerprintMismatchError another tokenizer, vocabulary or protocol version
├── UnauthenticatedError     no token, or a wrong one
├── PermissionDeniedError    known, but not allowed to do this
├── SessionNotFoundError     expired, evicted or never opened: re-open with the full prefix
├── SessionOffsetError       append at the wrong position: rewind to expected_offset
├── CapacityError            sessions, tokens or queue are full: try again after the hint
│   ├── RateLimitedError     the tenant's tokens a minute are used up: try again after the hint
│   ├── QuotaError           the tenant's own limit of sessions or tokens in flight is reached
│   ├── SlowConsumerError    the client did not take its replies in time
│   └── MessageTooLargeError one message passes the limit of a message: never try again
├── NotReadyError            loading or draining: try again, or elsewhere
├── DeadlineError            the work was dropped before it started
├── EngineError              the engine failed; details stay in the server's log
└── NonFiniteError           the model produced a NaN or an infinity; no number leaves the server

A retry of the very same request helps only where retry_after_ms is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpc import StatusCode


class TeacherError(Exception):
    """Root of everything that a teacher server tells a client."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_ms: int = 0,
        expected_offset: int | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.expected_offset = expected_offset
        self.offset = offset


class InvalidRequestError(TeacherError, ValueError):
    """The request can never succeed as it is."""


class FingerprintMismatchError(TeacherError):
    """Client and server do not speak of the same tokens."""


class UnauthenticatedError(TeacherError):
    """No credentials, or wrong ones."""


class PermissionDeniedError(TeacherError, PermissionError):
    """The caller is known and may not do this."""


class SessionNotFoundError(TeacherError, LookupError):
    """The server holds no such session."""


class SessionOffsetError(TeacherError):
    """An append does not start where the session can take it."""


class CapacityError(TeacherError):
    """The server is full; try again after retry_after_ms."""


class RateLimitedError(CapacityError):
    """The tenant has had its tokens of this minute; try again after retry_after_ms."""


class QuotaError(CapacityError):
    """The tenant holds as many sessions or tokens in flight as it may."""


class SlowConsumerError(CapacityError):
    """The client did not take its replies in time and was cut off."""


class MessageTooLargeError(CapacityError):
    """One message is larger than either end accepts."""


class NotReadyError(TeacherError, ConnectionError):
    """The server is loading, draining or unreachable."""


class DeadlineError(TeacherError, TimeoutError):
    """The work was not started in time and was dropped."""


class EngineError(TeacherError, RuntimeError):
    """The engine failed."""


class NonFiniteError(TeacherError, ArithmeticError):
    """The model produced a NaN or an infinity."""


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """How one error class looks outside. Code and reason together name the class."""

    status: str
    """The name of gRPC's status."""
    http: int
    retryable: bool
    reason: str
    """`reason` of google.rpc.ErrorInfo and of the HTTP body."""

    @property
    def grpc(self) -> StatusCode:
        """Looked up when asked: engines and learner raise these errors without gRPC."""
        from grpc import StatusCode

        return StatusCode[self.status]


ERROR_CODES: dict[type[TeacherError], ErrorCode] = {
    InvalidRequestError: ErrorCode("INVALID_ARGUMENT", 400, False, "INVALID_REQUEST"),
    FingerprintMismatchError: ErrorCode("FAILED_PRECONDITION", 412, False, "FINGERPRINT_MISMATCH"),
    UnauthenticatedError: ErrorCode("UNAUTHENTICATED", 401, False, "UNAUTHENTICATED"),
    PermissionDeniedError: ErrorCode("PERMISSION_DENIED", 403, False, "PERMISSION_DENIED"),
    SessionNotFoundError: ErrorCode("NOT_FOUND", 404, True, "SESSION_UNKNOWN"),
    SessionOffsetError: ErrorCode("ABORTED", 409, True, "SEQUENCE_CONFLICT"),
    CapacityError: ErrorCode("RESOURCE_EXHAUSTED", 429, True, "OVERLOADED"),
    RateLimitedError: ErrorCode("RESOURCE_EXHAUSTED", 429, True, "RATE_LIMITED"),
    QuotaError: ErrorCode("RESOURCE_EXHAUSTED", 429, True, "QUOTA"),
    SlowConsumerError: ErrorCode("RESOURCE_EXHAUSTED", 408, False, "SLOW_CONSUMER"),
    MessageTooLargeError: ErrorCode("RESOURCE_EXHAUSTED", 413, False, "MESSAGE_TOO_LARGE"),
    NotReadyError: ErrorCode("UNAVAILABLE", 503, True, "NOT_READY"),
    DeadlineError: ErrorCode("DEADLINE_EXCEEDED", 504, True, "DEADLINE"),
    EngineError: ErrorCode("INTERNAL", 500, False, "ENGINE"),
    NonFiniteError: ErrorCode("DATA_LOSS", 502, False, "NONFINITE"),
}

OFFSETS = ("expected_offset", "offset")
"""What an error may tell besides its message."""
ERRORS_BY_NAME: dict[str, type[TeacherError]] = {cls.__name__: cls for cls in ERROR_CODES}
ERRORS_BY_REASON: dict[str, type[TeacherError]] = {
    code.reason: cls for cls, code in ERROR_CODES.items()
}


def code_of(error: TeacherError) -> ErrorCode:
    """The code of an error's class."""
    return ERROR_CODES[type(error)]


def error_to_json(error: TeacherError) -> dict[str, str | int | bool]:
    """What an HTTP body says of an error; the offsets only where it has them."""
    code = code_of(error)
    content: dict[str, str | int | bool] = {
        "type": type(error).__name__,
        "reason": code.reason,
        "message": error.message,
        "retryable": code.retryable,
        "retry_after_ms": error.retry_after_ms,
    }
    for name in OFFSETS:
        value = getattr(error, name)
        if value is not None:
            content[name] = value
    return content


def error_from_json(status: int, content: Mapping[str, object]) -> TeacherError:
    """The error of an HTTP answer: as raised, else by its status, else EngineError."""
    by_status = next((c for c, code in ERROR_CODES.items() if code.http == status), EngineError)
    cls = ERRORS_BY_REASON.get(str(content.get("reason")), by_status)

    def number(name: str) -> int | None:
        value = content.get(name)
        return value if isinstance(value, int) else None

    return cls(
        str(content.get("message", f"HTTP {status}")),
        retry_after_ms=number("retry_after_ms") or 0,
        **{name: number(name) for name in OFFSETS},
    )
