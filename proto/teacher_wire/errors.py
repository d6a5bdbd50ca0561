"""The error tree of the service, and the one table to gRPC and HTTP codes.

TeacherError
├── InvalidRequestError      bad ids, shapes, k or length; the message names value and limit
├── FingerprintMismatchError another tokenizer, vocabulary or protocol version
├── UnauthenticatedError     no token, or a wrong one
├── PermissionDeniedError    known, but not allowed to do this
├── SessionNotFoundError     expired, evicted or never opened: re-open with the full prefix
├── SessionOffsetError       append at the wrong position: rewind to expected_offset
├── CapacityError            sessions, tokens or queue are full: try again after the hint
├── NotReadyError            loading or draining: try again, or elsewhere
├── DeadlineError            the work was dropped before it started
├── EngineError              the engine failed; details stay in the server's log
└── NonFiniteError           the model produced a NaN or an infinity; no number leaves the server
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """How one error class looks outside."""

    grpc: StatusCode
    http: int
    retryable: bool


ERROR_CODES: dict[type[TeacherError], ErrorCode] = {
    InvalidRequestError: ErrorCode(StatusCode.INVALID_ARGUMENT, 400, False),
    FingerprintMismatchError: ErrorCode(StatusCode.FAILED_PRECONDITION, 412, False),
    UnauthenticatedError: ErrorCode(StatusCode.UNAUTHENTICATED, 401, False),
    PermissionDeniedError: ErrorCode(StatusCode.PERMISSION_DENIED, 403, False),
    SessionNotFoundError: ErrorCode(StatusCode.NOT_FOUND, 404, True),
    SessionOffsetError: ErrorCode(StatusCode.ABORTED, 409, True),
    CapacityError: ErrorCode(StatusCode.RESOURCE_EXHAUSTED, 429, True),
    NotReadyError: ErrorCode(StatusCode.UNAVAILABLE, 503, True),
    DeadlineError: ErrorCode(StatusCode.DEADLINE_EXCEEDED, 504, True),
    EngineError: ErrorCode(StatusCode.INTERNAL, 500, False),
    NonFiniteError: ErrorCode(StatusCode.DATA_LOSS, 502, False),
}

ERRORS_BY_NAME: dict[str, type[TeacherError]] = {cls.__name__: cls for cls in ERROR_CODES}


def code_of(error: TeacherError) -> ErrorCode:
    """The code of an error's class."""
    return ERROR_CODES[type(error)]
