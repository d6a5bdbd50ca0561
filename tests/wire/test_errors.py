"""The error table is complete and maps back, in-band and as a status. Run: pytest tests/wire"""

from __future__ import annotations

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from teacher_wire.errors import (
    ERROR_CODES,
    ERRORS_BY_NAME,
    CapacityError,
    TeacherError,
    code_of,
)
from teacher_wire.status import decode_error, decode_status, encode_error, encode_status


def subclasses(cls: type[TeacherError]) -> list[type[TeacherError]]:
    return [c for sub in cls.__subclasses__() for c in (sub, *subclasses(sub))]


ALL = subclasses(TeacherError)


def as_call_error(error: TeacherError) -> AioRpcError:
    status = encode_status(error)
    trailing = Metadata(*((key, value) for key, value in status.trailing_metadata))
    return AioRpcError(status.code, Metadata(), trailing, status.details)


def test_every_error_class_is_in_the_table() -> None:
    assert set(ALL) == set(ERROR_CODES) == set(ERRORS_BY_NAME.values())


def test_codes_and_reasons_are_told_apart() -> None:
    assert len({code.reason for code in ERROR_CODES.values()}) == len(ERROR_CODES)
    roots = [cls for cls in ERROR_CODES if cls.__base__ is not CapacityError]
    assert len({ERROR_CODES[cls].grpc for cls in roots}) == len(roots)
    assert len({ERROR_CODES[cls].http for cls in roots}) == len(roots)


@pytest.mark.parametrize("cls", ALL)
def test_errors_map_back_from_messages_and_statuses(cls: type[TeacherError]) -> None:
    error = cls("7 is more than 5", retry_after_ms=120, expected_offset=0, offset=9)
    for decoded in (decode_error(encode_error(error, "s")), decode_status(as_call_error(error))):
        assert type(decoded) is cls
        assert vars(decoded) == vars(error)
    assert as_call_error(error).code() is code_of(error).grpc


@pytest.mark.parametrize("cls", ALL)
def test_a_bare_status_maps_back_by_its_code(cls: type[TeacherError]) -> None:
    bare = AioRpcError(ERROR_CODES[cls].grpc, Metadata(), Metadata(), "details")
    decoded = decode_status(bare)
    assert type(decoded) is (CapacityError if issubclass(cls, CapacityError) else cls)
    assert decoded.retry_after_ms == 0
    assert decoded.expected_offset is None


def test_foreign_codes_and_names_become_engine_errors() -> None:
    unknown = AioRpcError(grpc.StatusCode.UNIMPLEMENTED, Metadata(), Metadata(), "no such method")
    assert type(decode_status(unknown)).__name__ == "EngineError"
    message = encode_error(ALL[0]("x"), "s")
    message.type = "SomethingNewer"
    assert type(decode_error(message)).__name__ == "EngineError"


def test_the_failed_append_is_named_unless_the_error_knows_better() -> None:
    assert decode_error(encode_error(ALL[0]("x"), "s", offset=4)).offset == 4
    assert decode_error(encode_error(ALL[0]("x", offset=0), "s", offset=4)).offset == 0
