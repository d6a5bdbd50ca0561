"""Several replicas of one teacher: who serves whom, and what moves when one goes.

Run: pytest tests/client/test_teacher_endpoints.py
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest

from teacher_client import endpoints
from teacher_client.client import TeacherClient, TeacherSession
from teacher_client.rendezvous import ranked
from teacher_client.retry import RetryLimits, backoff_s
from teacher_client.stream import Handshake, TeacherStream
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire.errors import FingerprintMismatchError, NotReadyError
from tests.client.client_sessions import (
    OPTIONS,
    POLICY,
    PROMPT,
    Restarting,
    append_all,
    client_of,
    make_span,
    reference,
    restarting,
)
from tests.teacher.scoring.fake_rows import assert_same_response, cut
from tests.waiting import LIMIT_S, eventually

SPAN = make_span(60)


class Replicas:
    """Three teachers, a client of them, and 24 sessions that are half way through."""

    def __init__(self, servers: list[Restarting], client: TeacherClient) -> None:
        self.servers = servers
        self.client = client
        self.sessions = [client.open(PROMPT, OPTIONS, POLICY) for _ in range(24)]
        self.addresses = [server.teacher.address for server in servers]

    def preferred(self, session: TeacherSession, rank: int = 0) -> str:
        return ranked(session.session_id, self.addresses)[rank]

    def homes(self) -> list[str]:
        """Where each session is, as the servers know it."""
        return [self.home(session) for session in self.sessions]

    def home(self, session: TeacherSession) -> str:
        assert session._opened_on is not None
        address = session._opened_on.endpoint
        server = self.servers[self.addresses.index(address)]
        assert ("test", session.session_id) in server.teacher.sessions._sessions
        return address

    async def append(self, start: int, stop: int) -> list[list]:  # type: ignore[type-arg]
        span = cut(SPAN, 0, stop)
        return list(
            await asyncio.gather(*(append_all(s, span, stop - start) for s in self.sessions))
        )


@asynccontextmanager
async def replicas() -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(restarting()) for _ in range(3)]
        addresses = [server.teacher.address for server in servers]
        client = await stack.enter_async_context(client_of(*addresses))
        yield Replicas(servers, client)


async def test_sessions_live_where_they_rank_highest() -> None:
    async with replicas() as group:
        await group.append(0, 30)
        assert group.homes() == [group.preferred(session) for session in group.sessions]
        assert len(set(group.homes())) == 3


async def test_only_the_sessions_of_a_lost_replica_move_each_to_its_next_choice() -> None:
    async with replicas() as group:
        first = await group.append(0, 30)
        before = group.homes()
        lost = group.addresses[1]
        assert lost in before
        await group.servers[1].stop()
        second = await group.append(30, 60)
        for session, home in zip(group.sessions, before, strict=True):
            expected = group.preferred(session, 1) if home == lost else home
            assert group.home(session) == expected
        whole = await reference(SPAN)
        for parts in zip(first, second, strict=True):
            assert_same_response([*parts[0], *parts[1]], whole)


async def test_a_replica_that_comes_back_gets_new_sessions_and_old_ones_stay() -> None:
    async with replicas() as group:
        await group.append(0, 30)
        back = group.addresses[2]
        await group.servers[2].stop()
        await group.append(30, 45)
        moved = group.homes()
        assert back not in moved
        await group.servers[2].start()
        new = [group.client.open(PROMPT, OPTIONS, POLICY) for _ in range(40)]
        mine = next(session for session in new if group.preferred(session) == back)
        give_up = time.monotonic() + LIMIT_S
        while mine._opened_on is None or group.home(mine) != back:
            assert time.monotonic() < give_up
            mine = group.client.open(PROMPT, OPTIONS, POLICY)
            if group.preferred(mine) == back:
                await mine.append(cut(SPAN, 0, 5))
        await group.append(45, 60)
        assert group.homes() == moved


async def test_a_draining_replica_answers_what_it_has_and_its_sessions_move() -> None:
    async with replicas() as group:
        first = await group.append(0, 30)
        before = group.homes()
        for server in group.servers:
            server.engine._base_latency_s = 2.0
        asked = sum(server.engine.num_queries for server in group.servers) + 24
        waiting = asyncio.create_task(group.append(30, 45))
        await eventually(lambda: sum(s.engine.num_queries for s in group.servers) == asked)
        draining = group.servers[0]
        asked = draining.engine.num_queries
        assert await draining.teacher.service.drain("test", LIMIT_S)
        second = await waiting
        # What had been asked was answered there and nowhere again.
        assert draining.engine.num_queries == asked
        assert sum(server.engine.num_queries for server in group.servers) == 2 * 24
        await draining.stop()
        third = await group.append(45, 60)
        for session, home in zip(group.sessions, before, strict=True):
            expected = group.preferred(session, 1) if home == group.addresses[0] else home
            assert group.home(session) == expected
        whole = await reference(SPAN)
        for parts in zip(first, second, third, strict=True):
            assert_same_response([*parts[0], *parts[1], *parts[2]], whole)


async def test_a_session_leaves_a_draining_replica_before_that_has_ended() -> None:
    async with replicas() as group:
        await group.append(0, 30)
        draining = group.servers[0]
        busy, idle = [s for s in group.sessions if group.home(s) == group.addresses[0]][:2]
        draining.engine._base_latency_s = 5.0
        asked = draining.engine.num_queries
        waiting = asyncio.create_task(busy.append(cut(SPAN, 30, 45)))
        await eventually(lambda: draining.engine.num_queries > asked)
        ending = asyncio.create_task(draining.teacher.service.drain("test", LIMIT_S))
        await asyncio.sleep(0.1)
        await idle.append(cut(SPAN, 30, 45))
        assert not ending.done()
        assert group.home(idle) == group.preferred(idle, 1)
        assert len((await waiting).rows) == 15
        assert await ending
        assert draining.engine.num_queries == asked + 1


async def test_whole_scores_spread_and_survive_the_loss_of_a_replica() -> None:
    async with replicas() as group:
        await asyncio.gather(
            *(group.client.score(PROMPT, SPAN, OPTIONS, POLICY) for _ in range(30))
        )
        assert all(server.engine.num_queries > 0 for server in group.servers)
        await group.servers[0].stop()
        scores = await asyncio.gather(
            *(group.client.score(PROMPT, SPAN, OPTIONS, POLICY) for _ in range(10))
        )
        whole = await reference(SPAN)
        for one in scores:
            assert_same_response([one], whole)


async def test_a_replica_that_is_absent_at_first_joins_later() -> None:
    async with restarting() as early, restarting() as late:
        addresses = [early.teacher.address, late.teacher.address]
        await late.stop()
        # One that waited for the absent one too would fail after the time to connect.
        async with client_of(*addresses) as client:
            session = client.open(PROMPT, OPTIONS, POLICY)
            await session.append(cut(SPAN, 0, 5))
            assert len(early.teacher.sessions) == 1
            await late.start()
            give_up = time.monotonic() + LIMIT_S
            while not len(late.teacher.sessions):
                assert time.monotonic() < give_up
                await client.open(PROMPT, OPTIONS, POLICY).append(cut(SPAN, 0, 5))


async def test_replicas_with_other_weights_are_refused_at_connect() -> None:
    one, other = (
        replace(teacher_info(FakeEngine()), weights_digest=digest) for digest in ("aaa", "bbb")
    )
    async with local_teacher(info=one) as first, local_teacher(info=other) as second:
        with pytest.raises(FingerprintMismatchError, match=r"weights_digest '(aaa|bbb)', the run"):
            async with client_of(first.address, second.address):
                pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights_digest": "other"}, "weights_digest 'other', the run began with ''"),
        ({"max_context": 100}, "allows max_context 100, the run counts on 8192"),
    ],
)
async def test_a_replica_that_comes_back_different_is_not_used(
    change: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with replicas() as group:
        await group.append(0, 30)
        server = group.servers[0]
        await server.stop()
        different = replace(teacher_info(server.engine), **change)  # type: ignore[arg-type]
        await server.start(info=different)
        give_up = time.monotonic() + LIMIT_S
        with caplog.at_level(logging.ERROR):
            while reason not in caplog.text:
                assert time.monotonic() < give_up
                await asyncio.sleep(0.02)
        await group.append(30, 60)
        assert len(server.teacher.sessions) == 0
        await server.stop()
        await server.start()
        give_up = time.monotonic() + LIMIT_S
        while not len(server.teacher.sessions):
            assert time.monotonic() < give_up
            await group.client.open(PROMPT, OPTIONS, POLICY).append(cut(SPAN, 0, 5))


async def test_the_lowest_limits_of_the_first_replicas_hold() -> None:
    small = teacher_info(FakeEngine(), max_append_tokens=64)
    async with local_teacher() as large, local_teacher(info=small) as other:
        for addresses in ((large.address, other.address), (other.address, large.address)):
            async with client_of(*addresses) as client:
                assert client.info.max_append_tokens == 64


async def test_a_port_that_only_closes_is_knocked_at_ever_more_rarely() -> None:
    knocks = []

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        knocks.append(time.monotonic())
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(NotReadyError, match=f"127.0.0.1:{port}"):
            async with client_of(f"127.0.0.1:{port}", connect_timeout_s=3, limits=RetryLimits()):
                pass
    gaps = np.diff(knocks)
    # 0.05 s doubling to 2 s: seven or eight in three seconds, a few more when jitter is low, and
    # fewer when the machine is busy.
    assert 3 <= len(knocks) <= 14
    assert gaps[-2:].min() > 0.2


async def test_streams_to_one_address_do_not_share_a_connection() -> None:
    relays: list[asyncio.Task[None]] = []
    async with local_teacher() as teacher:
        host, _, port = teacher.address.partition(":")

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            relays.append(task)
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
            try:
                await asyncio.gather(_copy(reader, up_writer), _copy(up_reader, writer))
            finally:
                writer.close()
                up_writer.close()

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        handshake = Handshake(tokenizer_fingerprint="", vocab_size=512, run_id="test")
        streams = [(await TeacherStream.connect(address, handshake, 5))[0] for _ in range(2)]
        assert len(relays) == 2
        await asyncio.gather(*(stream.aclose() for stream in streams))
        server.close()
        # gRPC may keep a connection for a while after its channel was closed.
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read(65536):
        writer.write(block)


async def test_an_attempt_to_connect_is_cancelled_even_as_its_channel_changes() -> None:
    """Both at once: lost there, the cancellation of a keeper left the client closing for ever."""
    changed = asyncio.get_running_loop().create_future()

    class Channel:
        def get_state(self, try_to_connect: bool) -> grpc.ChannelConnectivity:
            return grpc.ChannelConnectivity.CONNECTING

        async def wait_for_state_change(self, _state: grpc.ChannelConnectivity) -> None:
            await changed

    handshake = Handshake(tokenizer_fingerprint="", vocab_size=512, run_id="test")
    stream = TeacherStream("127.0.0.1:1", handshake)
    await stream._channel.close()
    stream._channel = Channel()
    connecting = asyncio.create_task(stream._wait_until_connected(timeout_s=5.0))
    await asyncio.sleep(0.05)
    changed.set_result(None)
    connecting.cancel()
    await asyncio.wait({connecting}, timeout=LIMIT_S)
    assert connecting.cancelled()


async def test_clients_come_back_after_one_short_pause_and_not_in_one_burst(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Judged by the pauses that they choose: when they are over, a busy machine decides."""
    num_clients, window_s = 20, 0.5
    last: dict[asyncio.Task[None] | None, float] = {}

    def noted(limits: RetryLimits, attempt: int) -> float:
        pause_s = backoff_s(limits, attempt)
        last[asyncio.current_task()] = pause_s
        return pause_s

    monkeypatch.setattr(endpoints, "backoff_s", noted)
    async with restarting() as server, AsyncExitStack() as stack:
        address = server.teacher.address
        clients = [
            await stack.enter_async_context(client_of(address, limits=RetryLimits()))
            for _ in range(num_clients)
        ]
        await server.stop()
        await asyncio.sleep(3.0)
        await server.start()
        await asyncio.gather(*(client.endpoints.stream_for("s") for client in clients))
        assert len(last) == num_clients, "each keeps its one teacher"
        pauses = np.sort(list(last.values()))
        assert pauses.max() <= RetryLimits().max_backoff_s
        in_window = np.searchsorted(pauses, pauses + window_s) - np.arange(num_clients)
        # 8 are expected in the fullest half second and the deviation is 2; without jitter all 20
        # come at once. The bound of twice the even share is the law in test_teacher_client.
        assert in_window.max() <= 16


async def test_a_lost_replica_is_seen_and_said_and_so_is_its_return(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It showed nowhere: sessions moved, and the run went on a replica short."""
    async with replicas() as group:
        known, (lost, *others) = group.client.endpoints, group.addresses
        assert {r.address: (r.up, r.losses) for r in known.replicas} == dict.fromkeys(
            group.addresses, (True, 0)
        )
        await group.append(0, 30)
        moving = group.homes().count(lost)
        assert moving
        with caplog.at_level(logging.WARNING):
            await group.servers[0].stop()
            await eventually(lambda: f"{lost} is not up, its sessions go on" in caplog.text)
            await group.append(30, 60)
            state = {r.address: (r.up, r.losses) for r in known.replicas}
            assert state == {lost: (False, 1), others[0]: (True, 0), others[1]: (True, 0)}
            assert known.num_failovers == moving
            await group.servers[0].start()
            await eventually(lambda: f"{lost} is up" in caplog.text)
        assert caplog.text.count("is not up") == 1
        assert [r.up for r in known.replicas] == [True] * 3


async def test_a_replica_that_is_absent_at_first_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async with restarting() as early, restarting() as late:
        await late.stop()
        with caplog.at_level(logging.WARNING):
            async with client_of(early.teacher.address, late.teacher.address) as client:
                said = f"{late.teacher.address} is not up, its sessions go on at the 1 of 2"
                assert said in caplog.text
                assert [r.up for r in client.endpoints.replicas] == [True, False]
                assert client.endpoints.num_failovers == 0
