"""A teacher under mixed clients for a long time: does its memory stay flat?

Row 18 of the fault table.

python -m tests.faults.soak --minutes 20                    writes docs/soak.json and docs/soak.md
python -m tests.faults.soak --minutes 120 --engine vllm     docs/soak-vllm.json and its table
python -m tests.faults.soak --report                        writes the table from the JSON

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from teacher_wire.pb import teacher_pb2 as pb
from tests.faults.engine_processes import descendants
from tests.faults.live_server import CLI, LiveServer, live_server
from tests.faults.scrape import Scrape
from tests.faults.streams import (
    answered,
    append_message,
    batch_of,
    hello,
    open_message,
    span_of,
    stub_at,
)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("--max-running", "8")


@dataclass(frozen=True)
class Teacher:
    """What is soaked, and what its clients may send."""

    program: tuple[str, ...]
    arguments: tuple[str, ...]
    json_path: Path
    name: str
    what: str
    vocabulary: int
    max_offset: int
    """Of a session, in tokens."""
    session_ttl_s: float
    slow_client_s: float
    """Long enough for a client on a machine that does other work too."""
    pause_s: float
    """Of a client between two visits."""

    def settings(self) -> tuple[str, ...]:
        return (
            *self.arguments,
            *SETTINGS,
            *("--session-ttl-s", f"{self.session_ttl_s:g}"),
            *("--slow-client-s", f"{self.slow_client_s:g}"),
        )


TEACHERS = {
    "fake": Teacher(
        CLI,
        ("--fake-latency-s", "0.002", "--max-sessions", "256"),
        ROOT / "docs/soak.json",
        "fake",
        "the fake engine",
        vocabulary=512,
        max_offset=1600,
        session_ttl_s=5.0,
        slow_client_s=2.0,
        pause_s=0.0,
    ),
    "vllm": Teacher(
        ("teacher_server.cli", "serve"),
        ("--config", "configs/teacher-demo.toml", "--max-sessions", "8192"),
        ROOT / "docs/soak-vllm.json",
        "vllm",
        "the playground's teacher on the vLLM engine",
        vocabulary=64,
        max_offset=256,
        session_ttl_s=30.0,
        slow_client_s=30.0,
        pause_s=0.2,
    ),
}
SAMPLE_S, SETTLE_S = 5.0, 2.0
"""Between samples; and until sessions whose clients are gone have ended, beyond their time."""
WARM_UP_SHARE, MIN_WARM_UP_S = 0.3, 60.0
MAX_SLOPE_MB_H, MAX_ENGINE_SLOPE_MB_H, MAX_FD_GROWTH = 1.0, 4.0, 3
CANCELLED, CANCELLED_FIRST = 6000, 1000
"""Clients that cancel, and those of them that are not measured."""
MAX_POINTS = 600
"""More samples are thinned out: the fit looks at every pair."""
EXPECTED_CODES = {"OK", "CANCELLED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
EXPECTED_ERRORS = {"DeadlineError", "SlowConsumerError"}


@dataclass(frozen=True)
class Visit:
    """One client's stay: where it goes, and what it draws its tokens from."""

    address: str
    teacher: Teacher
    rng: random.Random
    done: Counter[str]

    def append(self, name: str, offset: int, num_tokens: int, **fields: int) -> pb.SessionRequest:
        """Tokens that no other session has, so that the engine has work."""
        seed = self.rng.randrange(1 << 30)
        span = span_of(seed, offset, num_tokens, self.teacher.vocabulary)
        return append_message(name, span, **fields)

    async def opened(self, stub: Any, credit_bytes: int = 0) -> tuple[Any, str]:
        call, name = stub.Session(), f"{self.rng.getrandbits(64):x}"
        await call.write(hello(f"soak-{self.rng.randrange(3)}", credit_bytes))
        await call.write(open_message(name))
        assert (await call.read()).HasField("welcome")
        assert (await call.read()).HasField("opened")
        return call, name

    async def score(self, call: Any, name: str, offset: int) -> None:
        """Sixteen tokens; the answer has a row for each of them."""
        await call.write(self.append(name, offset, 16))
        self.counted(await call.read(), 16)

    def counted(self, reply: Any, num_rows: int) -> None:
        assert reply.HasField("scores"), reply
        assert reply.scores.rows.count == num_rows, reply
        self.done["rows"] += num_rows


Scenario = Callable[[Visit], Awaitable[None]]


async def in_order(visit: Visit) -> None:
    async with stub_at(visit.address) as stub:
        call, name = await visit.opened(stub)
        for index in range(visit.rng.randint(1, 8)):
            await visit.score(call, name, 16 * index)
        await call.write(pb.SessionRequest(close=pb.Close(session_id=name)))
        assert (await call.read()).HasField("closed")
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def in_batches(visit: Visit) -> None:
    """Three sessions side by side, whose messages travel together both ways, as a trainer's do."""
    async with stub_at(visit.address) as stub:
        call = stub.Session()
        await call.write(hello(f"soak-{visit.rng.randrange(3)}", accepts_batches=True))
        assert (await call.read()).welcome.accepts_batches
        names = [f"{visit.rng.getrandbits(64):x}" for _ in range(3)]
        rounds = [
            [open_message(name) for name in names],
            *(
                [visit.append(name, 16 * index, 16) for name in names]
                for index in range(visit.rng.randint(1, 8))
            ),
            [pb.SessionRequest(close=pb.Close(session_id=name)) for name in names],
        ]
        for messages in rounds:
            await call.write(pb.SessionRequest(batch=batch_of(messages)))
            await answered(call.read, len(messages))
        visit.done["rows"] += 16 * len(names) * (len(rounds) - 2)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def no_close(visit: Visit) -> None:
    """The connection goes away under an open session."""
    async with stub_at(visit.address) as stub:
        call, name = await visit.opened(stub)
        await visit.score(call, name, 0)


async def cancelled(visit: Visit) -> None:
    async with stub_at(visit.address) as stub:
        call, name = await visit.opened(stub)
        await call.write(visit.append(name, 0, 64))
        await asyncio.sleep(visit.rng.random() * 0.01)
        call.cancel()


async def too_late(visit: Visit) -> None:
    async with stub_at(visit.address) as stub:
        call, name = await visit.opened(stub)
        for _ in range(4):
            await call.write(visit.append(name, 0, 4, deadline_ms=1))
        for _ in range(4):
            assert (await call.read()).WhichOneof("message") in ("scores", "error")
        await call.done_writing()
        await call.read()


async def does_not_read(visit: Visit) -> None:
    """Grants no credit after the first reply, and is cut."""
    async with stub_at(visit.address) as stub:
        call, name = await visit.opened(stub, credit_bytes=1)
        await visit.score(call, name, 0)
        await call.write(visit.append(name, 16, 16))
        with suppress(grpc.aio.AioRpcError):
            await call.read()


async def killed(visit: Visit) -> None:
    """A process of its own, ended by SIGKILL in the middle of its work."""
    command = [sys.executable, "-m", "tests.faults.soak", "--client", visit.address]
    child = subprocess.Popen([*command, "--engine", visit.teacher.name], cwd=ROOT)
    try:
        await asyncio.sleep(2 + 2 * visit.rng.random())
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


async def client(visit: Visit) -> None:
    """Works until it is killed."""
    async with stub_at(visit.address) as stub:
        call, name = await visit.opened(stub)
        for index in itertools.count():
            await visit.score(call, name, 16 * index % visit.teacher.max_offset)


def sample(server: LiveServer, started: float) -> dict[str, float]:
    """Memory in MB, file descriptors and sessions of the server just now, and of its engine."""
    engine = descendants(server.process.pid)
    return {
        "s": round(time.monotonic() - started, 1),
        "rss_mb": round(server.rss_bytes() / 2**20, 3),
        "engine_rss_mb": round(sum(map(rss_bytes_of, engine)) / 2**20, 3),
        "fds": server.num_fds() + sum(len(list((one / "fd").iterdir())) for one in engine),
        "sessions": Scrape(server).value("teacher_sessions", state="open"),
    }


def rss_bytes_of(process: Path) -> int:
    """Of its /proc folder."""
    return int((process / "status").read_text().split("VmRSS:")[1].split()[0]) << 10


async def soak(
    server: LiveServer, teacher: Teacher, minutes: float, done: Counter[str]
) -> list[dict[str, float]]:
    """Runs all scenarios until the time is up or SIGINT; returns the samples."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, over.set)
    loop.call_later(minutes * 60, over.set)

    async def work(seed: int, choices: dict[Scenario, float]) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            scenario = rng.choices(list(choices), list(choices.values()))[0]
            await scenario(Visit(server.address, teacher, rng, done))
            done[scenario.__name__] += 1
            await asyncio.sleep(teacher.pause_s)

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


async def bytes_a_cancelled_client(
    server: LiveServer, teacher: Teacher, done: Counter[str]
) -> float:
    """Growth of the server's memory, by the clients that cancel in the middle of an append. Some
    of it is grpc.aio's, which nothing here can free, so this has no bound."""

    async def work(seed: int, number: int) -> None:
        rng = random.Random(seed)
        for _ in range(number):
            await cancelled(Visit(server.address, teacher, rng, done))
            done[cancelled.__name__] += 1

    rss = []
    for number in (CANCELLED_FIRST, CANCELLED - CANCELLED_FIRST):
        await asyncio.gather(*(work(seed, number // 4) for seed in range(4)))
        await asyncio.sleep(teacher.session_ttl_s + SETTLE_S)
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
        *engine_memory(samples),
        *(
            ("rows asked for and answered", str(number), "", True)
            for name, number in record["clients"].items()
            if name == "rows"
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


def engine_memory(samples: list[dict[str, float]]) -> list[tuple[str, str, str, bool]]:
    """Rows of an engine that has processes of its own."""
    if not samples[-1].get("engine_rss_mb"):
        return []
    slope = slope_per_hour(samples, "engine_rss_mb")
    first, last = (samples[at]["engine_rss_mb"] for at in (0, -1))
    bound = MAX_ENGINE_SLOPE_MB_H
    return [
        (
            "memory of the engine's processes, MB an hour",
            f"{slope:.2f}",
            f"< {bound}",
            slope < bound,
        ),
        (
            "memory of the engine's processes, MB, first and last",
            f"{first:.1f}, {last:.1f}",
            "",
            True,
        ),
    ]


def table(record: dict[str, Any]) -> str:
    """docs/soak.md"""
    minutes = record["samples"][-1]["s"] / 60
    lines = [
        "# Soak",
        "",
        f"{minutes:.1f} minutes of mixed clients against a teacher process with "
        f"{TEACHERS[record['engine']].what}, on {record['cores']} cores; made by "
        f"`make soak ENGINE={record['engine']}`.",
        "",
        "| | measured | bound | |",
        "|---|---|---|---|",
    ]
    for what, measured, bound, is_kept in judged(record):
        judgement = ("kept" if is_kept else "BROKEN") if bound else ""
        lines.append(f"| {what} | {measured} | {bound} | {judgement} |")
    clients = ", ".join(
        f"{n} {name.replace('_', ' ')}" for name, n in record["clients"].items() if name != "rows"
    )
    ends = ", ".join(f"{int(n)} {name}" for name, n in record["codes"].items())
    lines += ["", f"Clients: {clients}.", "", f"Calls by status: {ends}.", ""]
    return "\n".join(lines)


def run(teacher: Teacher, minutes: float) -> dict[str, Any]:
    """The whole soak; takes the time of a session's life longer than told."""
    done: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        live_server(Path(folder), *teacher.settings(), program=teacher.program) as server,
    ):
        samples = asyncio.run(soak(server, teacher, minutes, done))
        left_behind = asyncio.run(bytes_a_cancelled_client(server, teacher, done))
        give_up = time.monotonic() + teacher.session_ttl_s + 15
        while (left := sample(server, 0)["sessions"]) and time.monotonic() < give_up:
            time.sleep(0.5)
        scrape = Scrape(server)
        server.send_signal(signal.SIGTERM)
        return {
            "engine": teacher.name,
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
    parser.add_argument("--engine", choices=TEACHERS, default="fake")
    parser.add_argument("--out", type=Path, help="JSON, beside the table")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    teacher = TEACHERS[arguments.engine]
    if arguments.client:
        asyncio.run(client(Visit(arguments.client, teacher, random.Random(), Counter())))
    out = arguments.out or teacher.json_path
    if not arguments.report:
        record = run(teacher, arguments.minutes)
        out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    record = json.loads(out.read_text(encoding="utf-8"))
    text = table(record)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0 if all(kept for *_, kept in judged(record)) else 1


if __name__ == "__main__":
    sys.exit(main())
