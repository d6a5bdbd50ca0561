"""A teacher under mixed clients for a long time: does its memory stay flat?

Row 18 of the fault table.

python -m tests.faults.soak --minutes 20     runs, and writes docs/soak.json and docs/soak.md
python -m tests.faults.soak --report         writes docs/soak.md from docs/soak.json

Clients are in order, alone or in batches, leave without closing, are killed, come too late or do
not read. Afterwards many cancel in the middle of an append, apart from the others: what grpc.aio
leaks with them (docs/LOG.md) would be the slope of everything else. One SIGINT ends it early; what
was measured until then is reported, with its length. Exit 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from teacher_wire.pb import teacher_pb2 as pb
from tests.faults.live_server import LiveServer, live_server
from tests.faults.scrape import Scrape
from tests.faults.streams import (
    answered,
    append_message,
    batch_of,
    hello,
    open_message,
    span_at,
    stub_at,
)

ROOT = Path(__file__).resolve().parents[2]
JSON_PATH, TABLE_PATH = ROOT / "docs" / "soak.json", ROOT / "docs" / "soak.md"
SETTINGS = (
    *("--fake-latency-s", "0.002", "--max-running", "8", "--session-ttl-s", "5"),
    *("--slow-client-s", "2", "--max-sessions", "256"),
)
SAMPLE_S, SETTLE_S = 5.0, 7.0
"""Between samples; and until sessions whose clients are gone have ended."""
WARM_UP_SHARE, MIN_WARM_UP_S = 0.3, 60.0
MAX_SLOPE_MB_H, MAX_FD_GROWTH = 1.0, 3
CANCELLED, CANCELLED_FIRST = 6000, 1000
"""Clients that cancel, and those of them that are not measured."""
MAX_POINTS = 600
"""More samples are thinned out: the fit looks at every pair."""
EXPECTED_CODES = {"OK", "CANCELLED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
EXPECTED_ERRORS = {"DeadlineError", "SlowConsumerError"}

Scenario = Callable[[str, random.Random], Awaitable[None]]


async def _opened(stub: Any, rng: random.Random, credit_bytes: int = 0) -> tuple[Any, str]:
    call, name = stub.Session(), f"{rng.getrandbits(64):x}"
    await call.write(hello(f"soak-{rng.randrange(3)}", credit_bytes))
    await call.write(open_message(name))
    assert (await call.read()).HasField("welcome")
    assert (await call.read()).HasField("opened")
    return call, name


async def _append(call: Any, name: str, offset: int) -> None:
    await call.write(append_message(name, span_at(offset, 16)))
    reply = await call.read()
    assert reply.HasField("scores"), reply


async def in_order(address: str, rng: random.Random) -> None:
    async with stub_at(address) as stub:
        call, name = await _opened(stub, rng)
        for index in range(rng.randint(1, 8)):
            await _append(call, name, 16 * index)
        await call.write(pb.SessionRequest(close=pb.Close(session_id=name)))
        assert (await call.read()).HasField("closed")
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def in_batches(address: str, rng: random.Random) -> None:
    """Three sessions side by side, whose messages travel together both ways, as a trainer's do."""
    async with stub_at(address) as stub:
        call = stub.Session()
        await call.write(hello(f"soak-{rng.randrange(3)}", accepts_batches=True))
        assert (await call.read()).welcome.accepts_batches
        names = [f"{rng.getrandbits(64):x}" for _ in range(3)]
        rounds = [
            [open_message(name) for name in names],
            *(
                [append_message(name, span_at(16 * index, 16)) for name in names]
                for index in range(rng.randint(1, 8))
            ),
            [pb.SessionRequest(close=pb.Close(session_id=name)) for name in names],
        ]
        for messages in rounds:
            await call.write(pb.SessionRequest(batch=batch_of(messages)))
            await answered(call.read, len(messages))
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def no_close(address: str, rng: random.Random) -> None:
    """The connection goes away under an open session."""
    async with stub_at(address) as stub:
        call, name = await _opened(stub, rng)
        await _append(call, name, 0)


async def cancelled(address: str, rng: random.Random) -> None:
    async with stub_at(address) as stub:
        call, name = await _opened(stub, rng)
        await call.write(append_message(name, span_at(0, 64)))
        await asyncio.sleep(rng.random() * 0.01)
        call.cancel()


async def too_late(address: str, rng: random.Random) -> None:
    async with stub_at(address) as stub:
        call, name = await _opened(stub, rng)
        for _ in range(4):
            await call.write(append_message(name, span_at(0, 4), deadline_ms=1))
        for _ in range(4):
            assert (await call.read()).WhichOneof("message") in ("scores", "error")
        await call.done_writing()
        await call.read()


async def does_not_read(address: str, rng: random.Random) -> None:
    """Grants no credit after the first reply, and is cut."""
    async with stub_at(address) as stub:
        call, name = await _opened(stub, rng, credit_bytes=1)
        await _append(call, name, 0)
        await call.write(append_message(name, span_at(16, 16)))
        with suppress(grpc.aio.AioRpcError):
            await call.read()


async def killed(address: str, rng: random.Random) -> None:
    """A process of its own, ended by SIGKILL in the middle of its work."""
    command = [sys.executable, "-m", "tests.faults.soak", "--client", address]
    child = subprocess.Popen(command, cwd=ROOT)
    try:
        await asyncio.sleep(2 + 2 * rng.random())
    finally:
        child.kill()
        await asyncio.to_thread(child.wait)


SCENARIOS: dict[Scenario, float] = {
    in_order: 6,
    in_batches: 2,
    no_close: 2,
    too_late: 2,
    does_not_read: 0.1,
}


async def client(address: str) -> None:
    """Works until it is killed."""
    async with stub_at(address) as stub:
        call, name = await _opened(stub, random.Random())
        for index in itertools.count():
            await _append(call, name, 16 * (index % 100))


def sample(server: LiveServer, started: float) -> dict[str, float]:
    """Memory in MB, file descriptors and sessions of the server just now."""
    return {
        "s": round(time.monotonic() - started, 1),
        "rss_mb": round(server.rss_bytes() / 2**20, 3),
        "fds": server.num_fds(),
        "sessions": Scrape(server).value("teacher_sessions", state="open"),
    }


async def soak(server: LiveServer, minutes: float, done: Counter[str]) -> list[dict[str, float]]:
    """Runs all scenarios until the time is up or SIGINT; returns the samples."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, over.set)
    loop.call_later(minutes * 60, over.set)

    async def work(seed: int, choices: dict[Scenario, float]) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            scenario = rng.choices(list(choices), list(choices.values()))[0]
            await scenario(server.address, rng)
            done[scenario.__name__] += 1

    workers = [asyncio.create_task(work(seed, SCENARIOS)) for seed in range(4)]
    workers.append(asyncio.create_task(work(99, {killed: 1.0})))
    samples, started = [], time.monotonic()
    while not over.is_set():
        samples.append(await asyncio.to_thread(sample, server, started))
        for worker in workers:
            if worker.done():
                worker.result()  # a scenario that failed ends the soak
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), SAMPLE_S)
    await asyncio.gather(*workers)
    return samples


async def bytes_a_cancelled_client(server: LiveServer, done: Counter[str]) -> float:
    """Growth of the server's memory, by the clients that cancel in the middle of an append. Some
    of it is grpc.aio's, which nothing here can free, so this has no bound."""

    async def work(seed: int, number: int) -> None:
        rng = random.Random(seed)
        for _ in range(number):
            await cancelled(server.address, rng)
            done[cancelled.__name__] += 1

    rss = []
    for number in (CANCELLED_FIRST, CANCELLED - CANCELLED_FIRST):
        await asyncio.gather(*(work(seed, number // 4) for seed in range(4)))
        await asyncio.sleep(SETTLE_S)
        rss.append(server.rss_bytes())
    return (rss[1] - rss[0]) / (CANCELLED - CANCELLED_FIRST)


def slope_per_hour(samples: list[dict[str, float]], field: str) -> float:
    """Theil-Sen: the median of the slopes of all pairs, so that single peaks do not count."""
    step = max(1, len(samples) // MAX_POINTS)
    points = np.array([(one["s"], one[field]) for one in samples[::step]])
    first, second = np.triu_indices(len(points), k=1)
    seconds = points[second, 0] - points[first, 0]
    return float(np.median((points[second, 1] - points[first, 1]) / seconds) * 3600)


def after_warm_up(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    """What the fit looks at; the last half of a run too short for a warm-up."""
    length = samples[-1]["s"]
    warm_s = max(WARM_UP_SHARE * length, min(MIN_WARM_UP_S, length / 2))
    return [one for one in samples if one["s"] >= warm_s]


def judged(record: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Rows of the table: what, measured, bound, kept."""
    samples = after_warm_up(record["samples"])
    slope, left = slope_per_hour(samples, "rss_mb"), record["bytes_a_cancelled_client"]
    fds = [one["fds"] for one in samples]
    quarter = max(1, len(fds) // 4)
    growth = float(np.median(fds[-quarter:]) - np.median(fds[:quarter]))
    codes = sorted(set(record["codes"]) - EXPECTED_CODES)
    errors = sorted(set(record["errors"]) - EXPECTED_ERRORS)
    return [
        (
            "memory after warm-up, MB an hour",
            f"{slope:.2f}",
            f"< {MAX_SLOPE_MB_H}",
            slope < MAX_SLOPE_MB_H,
        ),
        (
            "memory, MB, first and last",
            f"{samples[0]['rss_mb']:.1f}, {samples[-1]['rss_mb']:.1f}",
            "",
            True,
        ),
        (
            "memory by each client that cancels an append, bytes",
            f"{left:.0f}",
            "",
            True,
        ),
        (
            "file descriptors, growth of the median",
            f"{growth:.0f}",
            f"<= {MAX_FD_GROWTH}",
            growth <= MAX_FD_GROWTH,
        ),
        (
            "sessions left",
            f"{record['sessions_left']:.0f}",
            "0",
            record["sessions_left"] == 0,
        ),
        ("unexpected codes", ", ".join(codes) or "none", "none", not codes),
        ("unexpected errors", ", ".join(errors) or "none", "none", not errors),
        ("exit code after SIGTERM", str(record["exit_code"]), "0", record["exit_code"] == 0),
    ]


def table(record: dict[str, Any]) -> str:
    """docs/soak.md"""
    minutes = record["samples"][-1]["s"] / 60
    lines = [
        "# Soak",
        "",
        f"{minutes:.1f} minutes of mixed clients against a teacher process with the fake engine, "
        f"on {record['cores']} cores; made by `make soak`.",
        "",
        "| | measured | bound | |",
        "|---|---|---|---|",
    ]
    for what, measured, bound, is_kept in judged(record):
        judgement = ("kept" if is_kept else "BROKEN") if bound else ""
        lines.append(f"| {what} | {measured} | {bound} | {judgement} |")
    clients = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in record["clients"].items())
    ends = ", ".join(f"{int(n)} {name}" for name, n in record["codes"].items())
    lines += ["", f"Clients: {clients}.", "", f"Calls by status: {ends}.", ""]
    return "\n".join(lines)


def run(minutes: float) -> dict[str, Any]:
    """The whole soak; takes the time of a session's life longer than told."""
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, live_server(Path(folder), *SETTINGS) as server:
        samples = asyncio.run(soak(server, minutes, done))
        left_behind = asyncio.run(bytes_a_cancelled_client(server, done))
        give_up = time.monotonic() + 20
        while (left := sample(server, 0)["sessions"]) and time.monotonic() < give_up:
            time.sleep(0.5)
        scrape = Scrape(server)
        server.send_signal(signal.SIGTERM)
        return {
            "cores": len(os.sched_getaffinity(0)),
            "clients": dict(done),
            "codes": dict(scrape.by("grpc_server_handled_total", "grpc_code")),
            "errors": dict(scrape.by("teacher_errors_total", "type")),
            "bytes_a_cancelled_client": left_behind,
            "sessions_left": left,
            "exit_code": server.exit_code(20),
            "samples": samples,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, default=JSON_PATH, help="JSON, beside the table")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        asyncio.run(client(arguments.client))
    if not arguments.report:
        record = run(arguments.minutes)
        arguments.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    record = json.loads(arguments.out.read_text(encoding="utf-8"))
    text = table(record)
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0 if all(kept for *_, kept in judged(record)) else 1


if __name__ == "__main__":
    sys.exit(main())
