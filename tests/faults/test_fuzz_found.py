"""What fuzzing has found, each case by itself. Run: pytest tests/faults/test_fuzz_found.py"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import grpc
import pytest

from teacher_server.testing import local_teacher
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import ScoreOptions
from tests.faults.fuzz_cases import score_request
from tests.faults.streams import SERVICE, hello

NO_MESSAGE = b"\xff\xff\xff"


async def answers_to(method: str, *raws: bytes) -> tuple[list[bytes], grpc.StatusCode, str]:
    """All replies to raw messages, and the status."""
    async with local_teacher() as teacher, grpc.aio.insecure_channel(teacher.address) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE}/{method}")()
        for raw in raws:
            await call.write(raw)
        await call.done_writing()
        replies = []
        with suppress(grpc.aio.AioRpcError):
            while (reply := await call.read()) is not grpc.aio.EOF:
                replies.append(reply)
        assert teacher.metrics.registry.get_sample_value(
            "teacher_errors_total", {"type": "InvalidRequestError"}
        )
        return replies, await call.code(), await call.details() or ""


@pytest.mark.parametrize("method", ["GetInfo", "GetTokens", "Score"])
async def test_bytes_that_are_no_message_are_the_clients_mistake(method: str) -> None:
    """grpc.aio says UNKNOWN, with the name and text of the Python exception."""
    replies, code, details = await answers_to(method, NO_MESSAGE)
    assert replies == []
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "protobuf" not in details


async def test_a_stream_survives_bytes_that_are_no_message() -> None:
    first = hello().SerializeToString()
    last = pb.SessionRequest(close=pb.Close(session_id="s")).SerializeToString()
    replies, code, _ = await answers_to("Session", first, NO_MESSAGE, last)
    parsed = [pb.SessionResponse.FromString(reply) for reply in replies]
    assert [reply.WhichOneof("message") for reply in parsed] == ["welcome", "error", "closed"]
    assert parsed[1].error.type == "InvalidRequestError"
    assert code is grpc.StatusCode.OK


@pytest.mark.parametrize("temperature", [1e-320, 9e-4, 1001.0, float("nan"), float("inf"), -1.0])
async def test_a_temperature_that_overflows_is_no_fault_of_the_model(temperature: float) -> None:
    request = score_request()
    request.options.temperature = temperature
    _, code, details = await answers_to("Score", request.SerializeToString())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature is" in details


def test_temperatures_at_the_bounds_are_served() -> None:
    for temperature in (1e-3, 1e3):
        assert ScoreOptions(k=1, temperature=temperature).temperature == temperature
