"""The server's counters equal what its clients have counted, and its gauges return to nought.

Row 21 of the fault table. Run: pytest tests/faults/test_metrics_truth.py
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from teacher_wire import codec
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import TokenSpan
from teacher_wire.status import decode_status
from tests.faults.live_server import BROKEN, LiveServer, live_server
from tests.faults.scrape import Scrape, scraped, until
from tests.faults.streams import (
    PROMPT,
    SERVICE,
    answered,
    append_message,
    batch_of,
    hello,
    open_message,
    span_at,
    stub_at,
)

pytestmark = pytest.mark.e2e

TTL_S = 4.0
SLOW_S = 1.0
GAUGES_OF_WORK = (
    "teacher_queue_depth",
    "teacher_queue_tokens",
    "teacher_batch_sessions",
    "teacher_batch_tokens",
    "teacher_send_queue_bytes",
    "teacher_engine_silent_seconds",
)


class Counts:
    """What the clients of this test have seen."""

    def __init__(self) -> None:
        self.started: Counter[str] = Counter()
        self.codes: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[str] = Counter()
        """By the clients."""
        self.received: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.resumes: Counter[str] = Counter()
        self.left_behind = 0
        """Sessions of broken streams."""


class Speaker:
    """A stream whose every message is counted."""

    def __init__(self, stub: Any, counts: Counts, tenant: str, credit_bytes: int = 0) -> None:
        self.tenant = tenant
        self._counts = counts
        self._credit_bytes = credit_bytes
        self._call = stub.Session()
        counts.started["Session"] += 1

    async def greet(self) -> None:
        assert await self.ask(hello(self.tenant, self._credit_bytes)) == "welcome"

    async def tell(self, message: pb.SessionRequest) -> None:
        await self._call.write(message)
        self._counts.sent["Session"] += 1

    async def hear(self) -> pb.SessionResponse:
        message = await self._call.read()
        assert message is not grpc.aio.EOF
        self._counts.received["Session"] += 1
        return message

    async def ask(self, message: pb.SessionRequest) -> str:
        """Sends one message and takes its one answer; the kind of it, or the error's class."""
        await self.tell(message)
        answer = await self.hear()
        kind = str(answer.WhichOneof("message"))
        if kind == "error":
            self._counts.errors[answer.error.type] += 1
            return answer.error.type
        if kind == "scores":
            self._counts.tokens[self.tenant] += answer.scores.rows.count
            self._counts.outcomes["admitted", self.tenant] += 1
        return kind

    async def close(self) -> None:
        await self._call.done_writing()
        assert await self._call.read() is grpc.aio.EOF
        self._counts.codes["Session", "OK"] += 1

    async def break_off(self, sessions: int) -> None:
        self._call.cancel()
        self._counts.codes["Session", "CANCELLED"] += 1
        self._counts.left_behind += sessions

    async def be_cut(self) -> None:
        """Reads the status that ends the stream."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._call.read()
        self.note_end(caught.value)

    def note_end(self, error: grpc.aio.AioRpcError) -> None:
        self._counts.codes["Session", error.code().name] += 1
        self._counts.errors[type(decode_status(error)).__name__] += 1


async def orderly(stub: Any, counts: Counts, tenant: str, appends: int) -> None:
    """Opens, appends, rewinds, goes on, errs, closes."""
    speaker = Speaker(stub, counts, tenant)
    await speaker.greet()
    for name in ("a", "b"):
        assert await speaker.ask(open_message(name)) == "opened"
        for index in range(appends):
            assert await speaker.ask(append_message(name, span_at(5 * index, 5))) == "scores"
    assert await speaker.ask(append_message("a", span_at(5, 3))) == "scores"
    assert await speaker.ask(append_message("a", span_at(900, 3))) == "SessionOffsetError"
    assert await speaker.ask(append_message("nobody", span_at(0, 3))) == "SessionNotFoundError"
    outside = TokenSpan(
        offset=8, token_ids=PROMPT + 600, candidate_ids=span_at(0, 5).candidate_ids, event_mask=None
    )
    assert await speaker.ask(append_message("a", outside)) == "InvalidRequestError"
    for resumed in ("a", "elsewhere"):
        scored = codec.encode_ids(span_at(0, 4).token_ids)
        message = open_message(resumed, scored_ids=scored, drift=pb.DriftState(num_tokens=4))
        assert await speaker.ask(message) == "opened"
        counts.resumes["held" if resumed == "a" else "rebuilt"] += 1
    assert await speaker.ask(pb.SessionRequest()) == "InvalidRequestError"
    for name in ("b", "b", "nobody"):
        message = pb.SessionRequest(close=pb.Close(session_id=name))
        assert await speaker.ask(message) == "closed"
    await speaker.close()


async def in_batches(stub: Any, counts: Counts) -> None:
    """A batch is one message, and an append in it one append."""
    speaker = Speaker(stub, counts, "batches")
    assert await speaker.ask(hello("batches", accepts_batches=True)) == "welcome"
    names = ("a", "b", "c")
    for messages in (
        [open_message(name) for name in names],
        [append_message(name, span_at(0, 5)) for name in names],
        [pb.SessionRequest(close=pb.Close(session_id=name)) for name in names],
    ):
        await speaker.tell(pb.SessionRequest(batch=batch_of(messages)))
        await answered(speaker.hear, len(names))
    counts.tokens["batches"] += 5 * len(names)
    counts.outcomes["admitted", "batches"] += len(names)
    await speaker.close()


async def too_late(stub: Any, counts: Counts, server: LiveServer, gate: Path) -> None:
    """A deadline that passes while another session has the engine."""
    busy, late = Speaker(stub, counts, "busy"), Speaker(stub, counts, "late")
    for speaker in (busy, late):
        await speaker.greet()
        assert await speaker.ask(open_message("s")) == "opened"
    gate.touch()
    working = asyncio.create_task(busy.ask(append_message("s", span_at(0, 2))))
    await until(server, lambda scrape: scrape.value("teacher_batch_sessions") == 1)
    assert await late.ask(append_message("s", span_at(0, 2), deadline_ms=20)) == "DeadlineError"
    counts.outcomes["expired", "late"] += 1
    gate.unlink()
    assert await working == "scores"
    await busy.close()
    await late.close()


async def broken_off(stub: Any, counts: Counts, server: LiveServer, gate: Path) -> None:
    """A client that goes while its append is in the engine."""
    speaker = Speaker(stub, counts, "gone")
    await speaker.greet()
    assert await speaker.ask(open_message("s")) == "opened"
    gate.touch()
    await speaker.tell(append_message("s", span_at(0, 2)))
    await until(server, lambda scrape: scrape.value("teacher_batch_sessions") == 1)
    await speaker.break_off(sessions=1)
    counts.outcomes["cancelled", "gone"] += 1
    await until(server, lambda scrape: scrape.value("teacher_batch_sessions") == 0)
    gate.unlink()


async def too_slow(stub: Any, counts: Counts) -> None:
    """A client that grants credit for one reply and then no more."""
    speaker = Speaker(stub, counts, "slow", credit_bytes=1)
    await speaker.greet()
    assert await speaker.ask(open_message("s")) == "opened"
    assert await speaker.ask(append_message("s", span_at(0, 2))) == "scores"
    await speaker.tell(append_message("s", span_at(2, 2)))
    await speaker.be_cut()
    counts.tokens["slow"] += 2  # scored, and never sent
    counts.outcomes["admitted", "slow"] += 1
    counts.left_behind += 1


async def refused_at_hello(stub: Any, counts: Counts) -> None:
    speaker = Speaker(stub, counts, "old")
    await speaker.tell(pb.SessionRequest(hello=pb.Hello(protocol_version=99)))
    await speaker.be_cut()


async def unary(stub: Any, counts: Counts) -> None:
    """GetInfo, and Score that is answered, refused and too late."""
    await stub.GetInfo(pb.GetInfoRequest())
    for tally in (counts.started, counts.sent, counts.received):
        tally["GetInfo"] += 1
    counts.codes["GetInfo", "OK"] += 1
    opened = open_message("s").open
    for tokens, changes in ((6, {}), (6, {"prompt_ids": b"\x01"}), (0, {})):
        span = append_message("s", span_at(0, tokens)).append.span
        fields = {"prompt_ids": opened.prompt_ids, "run_id": "once"} | changes
        request = pb.ScoreRequest(span=span, options=opened.options, **fields)
        counts.started["Score"] += 1
        counts.sent["Score"] += 1
        try:
            chunks = [chunk async for chunk in stub.Score(request)]
        except grpc.aio.AioRpcError as error:
            counts.codes["Score", error.code().name] += 1
            counts.errors[type(decode_status(error)).__name__] += 1
        else:
            counts.codes["Score", "OK"] += 1
            counts.received["Score"] += len(chunks)
            counts.tokens["once"] += tokens
            counts.outcomes["admitted", "once"] += 1
    assert counts.codes["Score", "INVALID_ARGUMENT"] == 2


async def http(server: LiveServer, counts: Counts) -> None:
    for path, status in (("/healthz", 200), ("/v1/info", 200), ("/nowhere", 404)):
        assert (await asyncio.to_thread(server.get, path))[0] == status
    counts.errors["InvalidRequestError"] += 1  # the path that is none


async def mixed_load(server: LiveServer, counts: Counts, gate: Path) -> None:
    async with stub_at(server.address) as stub:
        for index, tenant in enumerate(("one", "two", "three")):
            await orderly(stub, counts, tenant, appends=3 + index)
        await in_batches(stub, counts)
        await too_late(stub, counts, server, gate)
        await broken_off(stub, counts, server, gate)
        await too_slow(stub, counts)
        await refused_at_hello(stub, counts)
        await unary(stub, counts)
        await http(server, counts)


def assert_equal(scrape: Scrape, counts: Counts) -> None:
    """Every counter against the clients' own."""
    assert scrape.by("grpc_server_started_total", "grpc_method") == counts.started
    assert scrape.by("grpc_server_handled_total", "grpc_method", "grpc_code") == counts.codes
    assert scrape.by("grpc_server_handling_seconds_count", "grpc_method") == counts.started
    assert scrape.by("grpc_server_msg_received_total", "grpc_method") == counts.sent
    assert scrape.by("grpc_server_msg_sent_total", "grpc_method") == counts.received
    assert scrape.by("grpc_server_started_total", "grpc_service")[SERVICE] == counts.started.total()
    assert scrape.by("teacher_errors_total", "type") == counts.errors
    assert scrape.by("teacher_tokens_scored_total", "tenant") == counts.tokens
    # The fake engine computes what it is asked for, and nothing again.
    assert scrape.value("teacher_computed_tokens_total") == counts.tokens.total()
    assert scrape.by("teacher_admission_total", "outcome", "tenant") == counts.outcomes
    assert scrape.by("teacher_resumes_total", "result") == counts.resumes
    assert scrape.by("teacher_dropped_total", "reason") == {
        "deadline": 1,
        "cancelled": 1,
        "slow": 1,
    }
    admitted = sum(n for (outcome, _), n in counts.outcomes.items() if outcome == "admitted")
    for name in ("teacher_queue_wait_seconds_count", "teacher_engine_step_seconds_count"):
        assert scrape.value(name) == admitted


def test_counters_equal_the_clients_own(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    arguments = ("--max-running", "1", "--no-self-test")
    limits = ("--session-ttl-s", str(TTL_S), "--slow-client-s", str(SLOW_S))
    broken = (*BROKEN, f"gate={gate}")
    with live_server(tmp_path, *arguments, *limits, program=broken) as server:

        async def scenario() -> None:
            counts = Counts()
            await mixed_load(server, counts, gate)
            scrape = await until(
                server,
                lambda s: (
                    s.by("grpc_server_handled_total", "grpc_method").total()
                    == counts.started.total()
                ),
            )
            assert_equal(scrape, counts)
            done = await until(server, lambda s: not s.value("teacher_sessions", state="open"))
            assert counts.left_behind
            assert done.by("teacher_evictions_total", "reason") == {"lost": counts.left_behind}
            assert done.value("teacher_sessions", state="active") == 0
            for name in GAUGES_OF_WORK:
                assert done.value(name) == 0, name
            assert done.by("teacher_phase", "phase") == {"serving": 1}

        asyncio.run(scenario())


def test_a_session_in_the_way_is_counted_and_an_open_that_finds_no_room(tmp_path: Path) -> None:
    limits = ("--max-sessions", "2", "--evict-idle-s", "3")
    with live_server(tmp_path, *limits, "--no-self-test") as server:

        async def scenario() -> None:
            counts = Counts()
            async with stub_at(server.address) as stub:
                speaker = Speaker(stub, counts, "t")
                await speaker.greet()
                for name in ("a", "b"):
                    assert await speaker.ask(open_message(name)) == "opened"
                scored = codec.encode_ids(span_at(0, 4).token_ids)
                drift = pb.DriftState(num_tokens=4)
                resume = open_message("c", scored_ids=scored, drift=drift)
                answers = [await speaker.ask(resume)]
                while answers[-1] != "opened":
                    await asyncio.sleep(0.5)
                    answers.append(await speaker.ask(resume))
                refused = answers[:-1]
                assert set(refused) == {"CapacityError"}
                await speaker.close()
            scrape = await scraped(server)
            assert scrape.by("teacher_evictions_total", "reason") == {"room": 1}
            assert scrape.by("teacher_resumes_total", "result") == {
                "refused": len(refused),
                "rebuilt": 1,
            }

        asyncio.run(scenario())


def test_every_reply_carries_its_queue_and_compute_time(tmp_path: Path) -> None:
    """The second of two queries waits for as long as the first one takes."""
    arguments = ("--fake-latency-s", "1", "--max-running", "1", "--no-self-test")
    with live_server(tmp_path, *arguments) as server:

        async def scenario() -> None:
            async with stub_at(server.address) as stub:
                call = stub.Session()
                await call.write(hello())
                timings, asked = [], time.monotonic()
                for name in ("a", "b"):
                    await call.write(open_message(name))
                    await call.write(append_message(name, span_at(0, 2)))
                while len(timings) < 2:
                    message = await call.read()
                    if message.HasField("scores"):
                        timings.append(message.scores.timing)
                took_us = 1e6 * (time.monotonic() - asked)
                call.cancel()
            first, second = timings
            assert min(first.engine_us, second.engine_us) >= 1e6
            assert max(first.queue_us, 0.5e6) < second.queue_us
            assert second.queue_us + second.engine_us <= took_us

        asyncio.run(scenario())
