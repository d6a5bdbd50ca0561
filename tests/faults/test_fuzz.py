"""No message, however broken, ends, hangs or undresses a server. Row 8 of the fault table.

Run: pytest tests/faults/test_fuzz.py, or `make fuzz` for the whole of it. tests/rounds.py has the
number of cases; FUZZ_SEED is their seed, and figures go to the file FUZZ_REPORT.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from benchmarks.recorded_rollouts import MadeUp, rollout, write_step
from teacher_wire import codec
from teacher_wire.errors import ERROR_CODES, EngineError, NonFiniteError
from teacher_wire.pb import teacher_pb2 as pb
from tests.faults import fuzz_cases
from tests.faults.live_server import LiveServer, live_server
from tests.faults.scrape import Scrape
from tests.faults.streams import SERVICE, BusyStream, hello, stub_at
from tests.rounds import ROUNDS
from tests.waiting import LIMIT_S

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(ROUNDS.timeout_s)]

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("FUZZ_SEED", "1"))
LAG_S, LAG_SHARE = 0.25, 0.99
"""The share of samples of the event loop's lag that must be below: an idle machine has them all."""
AT_ONCE = 8
MESSAGES_A_STREAM = 10
# What the service may say; the rest would be a failure of its own.
CODES = {code.grpc for cls, code in ERROR_CODES.items()} - {
    ERROR_CODES[EngineError].grpc,
    ERROR_CODES[NonFiniteError].grpc,
} | {grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED}
TYPES = {cls.__name__ for cls in ERROR_CODES} - {"EngineError", "NonFiniteError"}
HTTP_STATUSES = {200, 400, 429, 503}
ROUTED_STATUSES = {str(status) for status in HTTP_STATUSES | {404, 405}}
LOST_STATUS = "Internal error from Core"
"""What grpc.aio's client says, as INTERNAL, of a stream that ends while it writes. The server's own
failures are in its counter of errors, which is looked at in the end."""
SETTINGS = (
    *("--max-append-tokens", "128", "--max-context", "1024", "--max-sessions", "64"),
    *("--session-ttl-s", "5", "--evict-idle-s", "0", "--slow-client-s", "2"),
)
METHODS = ("GetInfo", "Score", "Session")


class Tally:
    """What came back."""

    def __init__(self) -> None:
        self.cases = 0
        self.answers: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.slowest = ""
        """What it was."""

    def note(self, answer: str, text: str = "") -> None:
        self.answers[answer] += 1
        for leak in fuzz_cases.LEAKS:
            assert leak not in text, f"a client was told {text!r}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("fuzz")
    row = rollout(MadeUp(k=4), step=1, index=1, num_tokens=5, seed=0)
    write_step(folder / "runs" / "demo", 1, [row])  # the names of the schema's examples
    with live_server(folder, *SETTINGS, "--runs", str(folder / "runs")) as running:
        yield running


async def in_time(work: Awaitable[Any], tally: Tally, what: object) -> None:
    """Fails when the server does not answer."""
    started = time.monotonic()
    done, _ = await asyncio.wait({asyncio.ensure_future(work)}, timeout=LIMIT_S)
    assert done, f"no answer within {LIMIT_S} s to {what!r}"
    seconds = time.monotonic() - started
    if seconds > tally.slowest_s:
        tally.slowest_s, tally.slowest = seconds, repr(what)[:200]
    for task in done:
        task.result()


async def side_by_side(number: int, work: Callable[[random.Random], Awaitable[Any]]) -> None:
    """Runs `work` so often, AT_ONCE at a time, each with a Random of its own."""

    async def share(first: int) -> None:
        for index in range(first, number, AT_ONCE):
            await work(random.Random(SEED * 1_000_003 + index))

    await asyncio.gather(*(share(first) for first in range(AT_ONCE)))


async def assert_sound(server: LiveServer, tally: Tally, kind: str) -> None:
    """The server serves as before; the figures of this kind are written down."""
    assert server.process.poll() is None, server.output[-2000:]
    status, _ = await asyncio.to_thread(server.get, "/readyz")
    assert status == 200
    stream = BusyStream(2)
    async with stub_at(server.address) as stub:
        task = asyncio.create_task(stream.run(stub))
        await asyncio.wait_for(stream.welcomed.wait(), LIMIT_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    scrape = await asyncio.to_thread(Scrape, server)
    told = scrape.by("teacher_errors_total", "type")
    assert not set(told) - TYPES, f"{told}: {server.output[-3000:]}"
    lag = "teacher_event_loop_lag_seconds"
    samples = scrape.value(f"{lag}_count")
    within = scrape.value(f"{lag}_bucket", le=str(LAG_S))
    if ROUNDS.timed:
        assert within >= LAG_SHARE * samples, (
            f"{samples - within} of {samples} lags above {LAG_S} s"
        )
    report = os.environ.get("FUZZ_REPORT")
    if report:
        figures = {
            "kind": kind,
            "cases": tally.cases,
            "seed": SEED,
            "slowest_s": round(tally.slowest_s, 3),
            "slowest": tally.slowest,
            "lags_above_250_ms": int(samples - within),
            "lag_samples": int(samples),
            "answers": dict(sorted(tally.answers.items())),
        }
        with Path(report).open("a", encoding="utf-8") as out:
            out.write(json.dumps(figures) + "\n")


async def speak(
    channel: grpc.aio.Channel, method: str, messages: list[bytes], tally: Tally
) -> None:
    """Sends messages as they are, reads all that comes, and judges it."""
    call: Any = channel.stream_stream(f"/{SERVICE}/{method}")()
    try:
        for message in messages:
            await call.write(message)
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the server has ended the call already: the status tells
    try:
        while (raw := await call.read()) is not grpc.aio.EOF:
            if method == "Session":
                judge_reply(pb.SessionResponse.FromString(raw), tally)
    except grpc.aio.AioRpcError:
        pass
    code, details = await call.code(), await call.details() or ""
    if details == LOST_STATUS:
        tally.note("status lost")
        return
    assert code in CODES, f"{code.name}: {details}"
    tally.note(code.name, details)


def judge_reply(reply: pb.SessionResponse, tally: Tally) -> None:
    kind = str(reply.WhichOneof("message"))
    if kind == "error":
        assert reply.error.type in TYPES, reply.error
        tally.note(reply.error.type, reply.error.message)
    else:
        tally.note(kind)
    if kind == "scores":
        codec.decode_scores([reply.scores] if reply.scores.last else [])


def bent(rng: random.Random, method: str) -> list[bytes]:
    """Mutated messages of one call."""
    if method == "GetInfo":
        return [rng.randbytes(rng.randint(0, 40))]
    if method == "Score":
        return [fuzz_cases.mutated(rng, fuzz_cases.score_request().SerializeToString())]
    raws = [hello("fuzz").SerializeToString()]
    raws += [m.SerializeToString() for m in fuzz_cases.valid_messages()]
    chosen = [
        # Some are left whole, so that the others meet sessions that are open.
        fuzz_cases.mutated(rng, raw) if rng.random() < 0.7 else raw
        for raw in rng.choices(raws, k=MESSAGES_A_STREAM)
    ]
    return [raws[0], *chosen] if rng.random() < 0.8 else chosen


def hostile(rng: random.Random, method: str) -> list[bytes]:
    """Messages of one call that parse."""
    if method == "GetInfo":
        return [b""]
    if method == "Score":
        like = fuzz_cases.score_request()
        return [fuzz_cases.hostile(rng, pb.ScoreRequest, like).SerializeToString()]
    first = hello("fuzz")
    if rng.random() < 0.2:
        first = pb.SessionRequest(hello=fuzz_cases.hostile(rng, pb.Hello, first.hello))  # type: ignore[arg-type]
    requests = [fuzz_cases.hostile_request(rng) for _ in range(MESSAGES_A_STREAM)]
    return [m.SerializeToString() for m in (first, *fuzz_cases.valid_messages()[:1], *requests)]


@pytest.mark.parametrize(("make", "share"), [(bent, 0.45), (hostile, 0.25)])
def test_messages_in_every_rpc(
    server: LiveServer, make: Callable[[random.Random, str], list[bytes]], share: float
) -> None:
    async def scenario() -> None:
        tally = Tally()
        options = codec.CHANNEL_LIMITS
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:

            async def case(rng: random.Random) -> None:
                method = rng.choices(METHODS, (1, 4, 5))[0]
                messages = make(rng, method)
                tally.cases += len(messages)
                await in_time(speak(channel, method, messages, tally), tally, messages)

            # A call carries 5.5 messages in the mean.
            await side_by_side(int(ROUNDS.fuzz_cases * share / 5.5), case)
        assert tally.answers["InvalidRequestError"] > 0
        await assert_sound(server, tally, make.__name__)

    asyncio.run(scenario())


def test_garbage_on_the_socket(server: LiveServer) -> None:
    async def scenario() -> None:
        tally = Tally()

        async def case(rng: random.Random) -> None:
            address = rng.choice((server.address, server.address, server.http_address))
            host, _, port = address.rpartition(":")
            raw = fuzz_cases.garbage(rng)
            tally.cases += 1
            await in_time(throw(host, int(port), raw, rng.random() < 0.5), tally, raw)

        async def throw(host: str, port: int, raw: bytes, listens: bool) -> None:
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(raw)
                await writer.drain()
                if listens:
                    writer.write_eof()
                    told = await asyncio.wait_for(reader.read(2000), 0.2)
                    tally.note("answer" if told else "end", told.decode("latin-1"))
            except TimeoutError:
                tally.note("silence")
            except ConnectionError:
                tally.note("reset")
            finally:
                writer.transport.abort()

        await side_by_side(int(ROUNDS.fuzz_cases * 0.05), case)
        await assert_sound(server, tally, "garbage")

    asyncio.run(scenario())


def answers_over_http(server: LiveServer) -> Counter[str]:
    """Number of answers by their status."""
    return Scrape(server).by("teacher_http_request_seconds_count", "status")


def test_http_through_schemathesis(server: LiveServer, tmp_path: Path) -> None:
    """All of its checks but one: whether the schema's requests are accepted depends on the model's
    vocabulary and limits, which no schema knows."""
    tally = Tally()
    before = answers_over_http(server)
    url = f"http://{server.http_address}/openapi.json"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", url]
    command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    command += [
        "--max-examples",
        str(max(10, int(ROUNDS.fuzz_cases * 0.1 / 2))),
        "--seed",
        str(SEED),
    ]
    command += ["--request-timeout", str(LIMIT_S), "--generation-database", "none", "--no-color"]
    env = os.environ | {
        "SCHEMATHESIS_HOOKS": "tests.faults.schemathesis_hooks",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")]),
    }
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    tally.answers = answers_over_http(server) - before
    tally.cases = tally.answers.total()
    assert tally.cases > ROUNDS.fuzz_cases * 0.1
    assert set(tally.answers) <= ROUTED_STATUSES
    asyncio.run(assert_sound(server, tally, "schemathesis"))


def test_http_bodies_that_nobody_meant(server: LiveServer) -> None:
    async def scenario() -> None:
        tally = Tally()
        async with httpx.AsyncClient(
            base_url=f"http://{server.http_address}", trust_env=False
        ) as client:

            async def case(rng: random.Random) -> None:
                path, body = fuzz_cases.http_body(rng)
                tally.cases += 1
                await in_time(ask(path, body), tally, (path, body))

            async def ask(path: str, body: bytes) -> None:
                headers = {"content-type": "application/json"}
                reply = await client.post(path, content=body, headers=headers, timeout=LIMIT_S)
                assert reply.status_code in HTTP_STATUSES, (path, body, reply.text)
                text = reply.text if reply.status_code != 200 else ""
                tally.note(str(reply.status_code), text)
                if reply.status_code != 200:
                    assert set(reply.json()) == {"error"}

            await side_by_side(int(ROUNDS.fuzz_cases * 0.05), case)
        assert tally.answers["200"] > 0
        assert tally.answers["400"] > 0
        await assert_sound(server, tally, "http bodies")

    asyncio.run(scenario())
