"""What the log says of a request, and what it never says. Run: pytest tests/faults/test_logs.py"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from teacher_server import logs
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.testing import local_teacher
from tests.faults.live_server import live_server
from tests.faults.streams import BusyStream, append_message, hello, open_message, span_at, stub_at
from tests.waiting import LIMIT_S

TOKEN_IDS = "401, 402, 403"


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def logged() -> Any:
    """What goes to the log, as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


async def test_a_failure_is_found_by_request_tenant_and_session(logged: io.StringIO) -> None:
    engine = FakeEngine()
    async with local_teacher(engine) as teacher, stub_at(teacher.address) as stub:
        calls = []
        for tenant in ("one", "two"):
            call = stub.Session()
            calls.append(call)
            await call.write(hello(tenant))
            for name in ("a", "b"):
                await call.write(open_message(f"{tenant}-{name}"))
            assert [(await call.read()).WhichOneof("message") for _ in range(3)]
        for tenant, call in zip(("one", "two"), calls, strict=True):
            for name in ("a", "b"):
                engine.inject(Fault.CRASH)
                await call.write(append_message(f"{tenant}-{name}", span_at(0, 3)))
                assert (await call.read()).error.type == "EngineError"
            call.cancel()
    # grpc writes lines of its own about streams that earlier tests have cut.
    ours = [
        line for line in lines_of(logged) if line["logger"] == "teacher_server.admission.scheduler"
    ]
    failures = [line for line in ours if line["level"] == "error"]
    assert [(line["tenant"], line["session"]) for line in failures] == [
        (tenant, f"{tenant}-{name}") for tenant in ("one", "two") for name in ("a", "b")
    ]
    assert len({line["request"] for line in failures}) == 2, "one request a stream"
    for line in failures:
        assert "injected crash" in line["exception"]
        assert line["time"].endswith("+00:00")


async def test_token_ids_are_never_logged(logged: io.StringIO) -> None:
    engine = FakeEngine()
    logging.getLogger().setLevel(logging.DEBUG)
    async with local_teacher(engine) as teacher, stub_at(teacher.address) as stub:
        call = stub.Session()
        await call.write(hello())
        await call.write(open_message("s"))
        for fault in (Fault.CRASH, Fault.RAISE, Fault.LEAK_NAN):
            engine.inject(fault)
            span = span_at(0, 3)
            span.token_ids[:] = (401, 402, 403)
            await call.write(append_message("s", span))
        with suppress(grpc.aio.AioRpcError):
            for _ in range(5):
                await call.read()
        call.cancel()
    text = logged.getvalue()
    assert "injected crash" in text, "nothing was logged: this shows nothing"
    for ids in (TOKEN_IDS, TOKEN_IDS.replace(",", ""), TOKEN_IDS.replace(" ", "")):
        assert ids not in text


def test_a_name_of_a_client_cannot_forge_a_line() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.TextFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    token = logs.session.set("a\nERROR forged")
    try:
        logger.info("hello")
    finally:
        logs.session.reset(token)
    assert len(stream.getvalue().splitlines()) == 1
    assert stream.getvalue().endswith("session='a\\nERROR forged'\n")


@pytest.mark.e2e
def test_every_line_of_a_server_is_an_object(tmp_path: Path) -> None:
    """Only the announcement for people is none."""
    with live_server(tmp_path, "--log-format", "json") as server:

        async def scenario() -> None:
            async with stub_at(server.address) as stub:
                stream = BusyStream(1)
                task = asyncio.create_task(stream.run(stub))
                await asyncio.wait_for(stream.welcomed.wait(), LIMIT_S)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(scenario())
        server.process.terminate()
        assert server.exit_code() == 0
        lines = [line for line in server.output.splitlines() if not line.startswith("I")]
    assert lines
    parsed = [json.loads(line) for line in lines if not line.startswith("teacher-server ready")]
    assert {"serving, was starting", "draining, was serving"} <= {p["message"] for p in parsed}
    begun = [p for p in parsed if p["message"] == "a stream begins"]
    assert begun[0]["tenant"] == "test"
    assert begun[0]["request"]


LOSES_ITS_TEACHER = """
import asyncio
from teacher_client.client import TeacherClient
from teacher_server.testing import local_teacher

async def scenario():
    async with local_teacher() as teacher:
        await TeacherClient.connect(
            [teacher.address], tokenizer_fingerprint="", vocab_size=512, run_id="test"
        )

for _ in range(4):
    asyncio.run(scenario())
"""


def test_a_client_that_loses_its_teacher_writes_nothing_of_grpcs_own() -> None:
    env = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = [sys.executable, "-c", LOSES_ITS_TEACHER]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    # What grpc.aio says of the server's calls, which are cut off here, is not what is asked about.
    of_the_core = [line for line in done.stderr.splitlines() if ".cc:" in line]
    assert (done.returncode, of_the_core) == (0, [])
