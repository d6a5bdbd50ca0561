"""Errors on the wire, both ways: in-band as an Error message, or as the status of a call.

The status carries google.rpc details: ErrorInfo with the reason of the table and the offsets in
`metadata`, and RetryInfo when there is a hint. Only a hint says that the same request may be sent
again as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from teacher_wire.errors import (
    ERROR_CODES,
    ERRORS_BY_NAME,
    ERRORS_BY_REASON,
    OFFSETS,
    CapacityError,
    EngineError,
    MessageTooLargeError,
    NotReadyError,
    TeacherError,
    code_of,
)
from teacher_wire.pb import teacher_pb2 as pb

ERROR_DOMAIN = "driftline"
_CLASS_BY_CODE: dict[grpc.StatusCode | None, type[TeacherError]] = {
    # Several classes share a code; without a reason it is the root of them.
    **{
        code.grpc: cls
        for cls, code in ERROR_CODES.items()
        if not any(issubclass(cls, other) for other in ERROR_CODES if other is not cls)
    },
    # What a client sees of a call that a stopping server cut.
    grpc.StatusCode.CANCELLED: NotReadyError,
}
_TOO_LARGE = "larger than max"
"""What gRPC itself says, without details, of a message that passes its limit."""


def encode_error(error: TeacherError, session_id: str, offset: int | None = None) -> pb.Error:
    """The error as a message; `offset` is the failed append's unless the error has its own."""
    return pb.Error(
        session_id=session_id,
        type=type(error).__name__,
        message=error.message,
        retryable=code_of(error).retryable,
        retry_after_ms=error.retry_after_ms,
        expected_offset=error.expected_offset,
        offset=offset if error.offset is None else error.offset,
    )


def decode_error(message: pb.Error) -> TeacherError:
    """The error in the class it was raised in; a class unknown here becomes an EngineError."""
    cls = ERRORS_BY_NAME.get(message.type, EngineError)
    return cls(
        message.message,
        retry_after_ms=message.retry_after_ms,
        expected_offset=message.expected_offset if message.HasField("expected_offset") else None,
        offset=message.offset if message.HasField("offset") else None,
    )


def encode_status(error: TeacherError) -> grpc.Status:
    """The error as the status of a call, for `abort_with_status`."""
    offsets = {name: getattr(error, name) for name in OFFSETS}
    reason = error_details_pb2.ErrorInfo(
        reason=code_of(error).reason,
        domain=ERROR_DOMAIN,
        metadata={name: str(value) for name, value in offsets.items() if value is not None},
    )
    status = status_pb2.Status(code=code_of(error).grpc.value[0], message=error.message)
    status.details.add().Pack(reason)
    if error.retry_after_ms:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(retry)
    converted: grpc.Status = rpc_status.to_status(status)
    return converted


def decode_status(error: grpc.aio.AioRpcError) -> TeacherError:
    """The error of a failed call: as raised, else by its code, else EngineError. Never raises:
    whatever stands between client and server may have made the status up."""
    message = error.details() or _name(error.code())
    cls = _CLASS_BY_CODE.get(error.code(), EngineError)
    if cls is CapacityError and _TOO_LARGE in message.lower():
        cls = MessageTooLargeError
    retry_after_ms = 0
    offsets: dict[str, int | None] = dict.fromkeys(OFFSETS)
    for detail in _details(error):
        reason, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if _unpacked(detail, reason) and reason.domain == ERROR_DOMAIN:
            cls = ERRORS_BY_REASON.get(reason.reason, cls)
            offsets = {name: _number(reason.metadata.get(name)) for name in OFFSETS}
        elif _unpacked(detail, retry):
            retry_after_ms = max(0, retry.retry_delay.ToMilliseconds())
    return cls(message, retry_after_ms=retry_after_ms, **offsets)


def _name(code: grpc.StatusCode | None) -> str:
    return "a status that gRPC does not know" if code is None else code.name


def _details(error: grpc.aio.AioRpcError) -> Sequence[any_pb2.Any]:
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # details of another status, or bytes that are none
        return ()
    return () if status is None else status.details


def _unpacked(
    detail: any_pb2.Any, into: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo
) -> bool:
    try:
        return detail.Unpack(into)
    except DecodeError:
        return False


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None
