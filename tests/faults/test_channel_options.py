"""gRPC ignores an option it does not know, so each option of ours is tested by its effect.

Every option of the server and of the client has a scenario, run twice: under the name that the
product uses, and with that one name misspelt. The two must look different; times and sizes are
scaled down. An option without a scenario fails. Run: pytest tests/faults/test_channel_options.py
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from teacher_client.stream import CHANNEL_OPTIONS
from teacher_server.rpc.server_options import SERVER_OPTIONS
from teacher_server.testing import local_teacher
from tests.faults.raw_h2 import MAX_CONCURRENT_STREAMS, h2_client, h2_server
from tests.waiting import LIMIT_S

MIB = 1 << 20
FAST_PINGS = {"grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 500}
"""A second is the shortest interval that gRPC takes."""

Options = dict[str, int]


class Race:
    """Two runs side by side: where something happens in one, the other is watched for as long
    again, and what has not happened by then does not."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._give_up = self._started + LIMIT_S

    async def happens(self, check: Callable[[], object]) -> bool:
        while not check():
            if time.monotonic() > self._give_up:
                return False
            await asyncio.sleep(0.01)
        took_s = time.monotonic() - self._started
        self._give_up = min(self._give_up, self._started + 2 * took_s + 0.5)
        return True


Scenario = Callable[[Options, Race], Awaitable[object]]


@asynccontextmanager
async def echo_server(options: Options) -> AsyncIterator[str]:
    """Answers a request that says a number with as many bytes."""

    async def echo(request: bytes, context: object) -> bytes:
        return bytes(int(request[:12]))

    handler = grpc.unary_unary_rpc_method_handler(echo)
    server = grpc.aio.server(options=list(options.items()))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def code_of_call(address: str, options: Options, send: int, receive: int) -> str:
    """How a call ends that sends and receives so many bytes."""
    async with grpc.aio.insecure_channel(address, options=list(options.items())) as channel:
        call: Any = channel.unary_unary("/t/Echo")
        try:
            answer = await call(str(receive).zfill(12).encode().ljust(send), timeout=LIMIT_S)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        assert len(answer) == receive
        return "OK"


BIG = {"grpc.max_receive_message_length": 64 * MIB, "grpc.max_send_message_length": 64 * MIB}


async def server_sends_2_mib(options: Options, race: Race) -> object:
    async with echo_server(options) as address:
        return await code_of_call(address, BIG, 12, 2 * MIB)


async def server_receives_5_mib(options: Options, race: Race) -> object:
    async with echo_server(options) as address:
        return await code_of_call(address, BIG, 5 * MIB, 1)


async def client_sends_2_mib(options: Options, race: Race) -> object:
    async with echo_server(BIG) as address:
        return await code_of_call(address, options, 2 * MIB, 1)


async def client_receives_5_mib(options: Options, race: Race) -> object:
    async with echo_server(BIG) as address:
        return await code_of_call(address, options, 12, 5 * MIB)


async def second_server_binds(options: Options, race: Race) -> object:
    async with local_teacher(options=tuple(options.items())) as teacher:
        other = grpc.aio.server(options=list(options.items()))
        try:
            other.add_insecure_port(teacher.address)
        except RuntimeError:
            return "refused"
        return "shared"


async def ends(closed: asyncio.Event, race: Race) -> str:
    return "closed" if await race.happens(closed.is_set) else "open"


async def server_meets_a_silent_client(options: Options, race: Race) -> object:
    async with local_teacher(options=tuple(options.items())) as teacher:
        async with h2_client(teacher.address, answers_pings=False) as peer:
            return await ends(peer.closed, race)


async def server_is_pinged_often(options: Options, race: Race) -> object:
    async with local_teacher(options=tuple(options.items())) as teacher:
        async with h2_client(teacher.address, answers_pings=True) as peer:
            await asyncio.wait_for(peer.settled.wait(), LIMIT_S)
            await peer.ping(8, 0.05)
            await race.happens(lambda: peer.goaway)
            return peer.goaway or "no goaway"


async def server_tells_its_limit(options: Options, race: Race) -> object:
    async with local_teacher(options=tuple(options.items())) as teacher:
        async with h2_client(teacher.address, answers_pings=True) as peer:
            await asyncio.wait_for(peer.settled.wait(), LIMIT_S)
            return peer.settings.get(MAX_CONCURRENT_STREAMS)


@asynccontextmanager
async def connected_client(options: Options, *, answers_pings: bool) -> AsyncIterator[Any]:
    async with h2_server(answers_pings=answers_pings) as server:
        channel = grpc.aio.insecure_channel(server.address, options=list(options.items()))
        async with channel:
            channel.get_state(try_to_connect=True)
            yield await asyncio.wait_for(server.connected.get(), LIMIT_S)


async def client_meets_a_silent_server(options: Options, race: Race) -> object:
    async with connected_client(options, answers_pings=False) as peer:
        return await ends(peer.closed, race)


async def client_pings_four_times(options: Options, race: Race) -> object:
    async with connected_client(options, answers_pings=True) as peer:
        return "goes on" if await race.happens(lambda: peer.num_pings >= 4) else "stops"


async def two_clients_of_one_server(options: Options, race: Race) -> object:
    async with h2_server(answers_pings=True) as server:
        items = list(options.items())
        async with (
            grpc.aio.insecure_channel(server.address, options=items) as one,
            grpc.aio.insecure_channel(server.address, options=items) as other,
        ):
            for channel in (one, other):
                channel.get_state(try_to_connect=True)
            await race.happens(lambda: server.connected.qsize() == 2)
            return server.connected.qsize()


TOO_MANY = "too_many_pings"
# name: scaled value, scenario, what is seen with the name and with a misspelt one
SERVER: dict[str, tuple[int, Scenario, object, object]] = {
    "grpc.max_send_message_length": (MIB, server_sends_2_mib, "RESOURCE_EXHAUSTED", "OK"),
    "grpc.max_receive_message_length": (
        8 * MIB,
        server_receives_5_mib,
        "OK",
        "RESOURCE_EXHAUSTED",
    ),
    "grpc.so_reuseport": (0, second_server_binds, "refused", "shared"),
    "grpc.keepalive_time_ms": (1000, server_meets_a_silent_client, "closed", "open"),
    "grpc.http2.ping_timeout_ms": (500, server_meets_a_silent_client, "closed", "open"),
    "grpc.keepalive_permit_without_calls": (1, server_meets_a_silent_client, "closed", "open"),
    "grpc.http2.min_ping_interval_without_data_ms": (
        10,
        server_is_pinged_often,
        "no goaway",
        TOO_MANY,
    ),
    "grpc.http2.max_ping_strikes": (0, server_is_pinged_often, "no goaway", TOO_MANY),
    "grpc.max_concurrent_streams": (7, server_tells_its_limit, 7, None),
}
CLIENT: dict[str, tuple[int, Scenario, object, object]] = {
    "grpc.max_send_message_length": (MIB, client_sends_2_mib, "RESOURCE_EXHAUSTED", "OK"),
    "grpc.max_receive_message_length": (
        8 * MIB,
        client_receives_5_mib,
        "OK",
        "RESOURCE_EXHAUSTED",
    ),
    "grpc.keepalive_time_ms": (1000, client_meets_a_silent_server, "closed", "open"),
    "grpc.http2.ping_timeout_ms": (500, client_meets_a_silent_server, "closed", "open"),
    "grpc.keepalive_permit_without_calls": (1, client_meets_a_silent_server, "closed", "open"),
    "grpc.http2.max_pings_without_data": (0, client_pings_four_times, "goes on", "stops"),
    "grpc.use_local_subchannel_pool": (1, two_clients_of_one_server, 2, 1),
}


async def both(options: Options, name: str, value: int, scenario: Scenario) -> list[object]:
    """What is seen with the option under its name, and under a name that gRPC does not know."""
    others = {key: FAST_PINGS.get(key, v) for key, v in options.items() if key != name}
    race = Race()
    return list(
        await asyncio.gather(
            scenario(others | {name: value}, race),
            scenario(others | {f"{name}_misspelt": value}, race),
        )
    )


@pytest.mark.parametrize("name", dict(SERVER_OPTIONS))
async def test_a_server_option_has_its_effect_only_under_its_name(name: str) -> None:
    assert name in SERVER, "no scenario shows the effect of this option"
    value, scenario, right, wrong = SERVER[name]
    assert await both(dict(SERVER_OPTIONS), name, value, scenario) == [right, wrong]


@pytest.mark.parametrize("name", dict(CHANNEL_OPTIONS))
async def test_a_client_option_has_its_effect_only_under_its_name(name: str) -> None:
    assert name in CLIENT, "no scenario shows the effect of this option"
    value, scenario, right, wrong = CLIENT[name]
    assert await both(dict(CHANNEL_OPTIONS), name, value, scenario) == [right, wrong]


def test_a_dead_peer_is_found_in_55_s_and_clients_ping_no_faster_than_they_may() -> None:
    """The values in use, which the scenarios scale down."""
    server, client = dict(SERVER_OPTIONS), dict(CHANNEL_OPTIONS)
    for options in (server, client):
        total = options["grpc.keepalive_time_ms"] + options["grpc.http2.ping_timeout_ms"]
        assert total <= 55_000
    allowed = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert allowed <= client["grpc.keepalive_time_ms"]
