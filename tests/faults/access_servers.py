"""Server processes with tenants and certificates, and streams that show a token."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from teacher_wire import codec
from teacher_wire.errors import TeacherError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import ScoreOptions, TokenSpan
from teacher_wire.status import decode_status

START_S = 40.0
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
SPAN = TokenSpan(offset=0, token_ids=np.array([9, 2, 6], np.int32))
OPTIONS = ScoreOptions(k=4)
Metadata = tuple[tuple[str, str], ...]


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "teacher_server.cli", *arguments]


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


def tenants_toml(tenants: dict[str, str], **extra: str) -> str:
    """The file for these tenants, each with its token; `extra` holds further lines by tenant."""
    return "\n".join(
        f"[tenants.{name}]\n"
        f'token_sha256 = ["{hashlib.sha256(token.encode()).hexdigest()}"]\n{extra.get(name, "")}\n'
        for name, token in tenants.items()
    )


def write_private(path: Path, text: str) -> None:
    """Replaces a file whole, as its own, so that nobody reads half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.chmod(0o600)
    partial.replace(path)


class Server:
    """One process; its output is a file."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        stamp = time.monotonic_ns()
        self._ready_file, self._log = folder / f"ready-{stamp}", folder / f"log-{stamp}"
        command = cli("serve", "--engine", "fake", "--grpc-port", "0", "--http-port", "0")
        command += ["--drain-s", "1", "--ready-file", str(self._ready_file), *arguments]
        env = {key: value for key, value in os.environ.items() if not key.startswith("TEACHER_")}
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream)
        self.grpc_address = self.http_address = ""

    def wait_until_ready(self) -> None:
        give_up = time.monotonic() + START_S
        while not self._ready_file.exists():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < give_up, "not ready in time"
            time.sleep(0.02)
        ready = json.loads(self._ready_file.read_text())
        self.grpc_address, self.http_address = ready["grpc_address"], ready["http_address"]

    def log(self) -> str:
        return self._log.read_text("utf-8", "backslashreplace")

    def hang_up(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)


@contextmanager
def server(folder: Path, *arguments: str) -> Iterator[Server]:
    started = Server(folder, *arguments)
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.end()


class Raw:
    """A Session stream spoken to message by message."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        stub: Any = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
        self.call = stub.Session(metadata=metadata)

    async def send(self, **message: Any) -> None:
        # A stream that was refused already fails the write; the read tells why.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self.call.write(pb.SessionRequest(**message))

    async def hello(self, run_id: str = "run") -> None:
        await self.send(hello=pb.Hello(protocol_version=1, run_id=run_id))
        assert (await self.call.read()).HasField("welcome")

    async def ask(self, **message: Any) -> pb.SessionResponse:
        await self.send(**message)
        answer: pb.SessionResponse = await self.call.read()
        return answer

    async def open(self, name: str) -> pb.SessionResponse:
        prompt, options = codec.encode_ids(PROMPT), codec.encode_options(OPTIONS)
        return await self.ask(open=pb.Open(session_id=name, prompt_ids=prompt, options=options))

    async def append(self, name: str, span: TokenSpan = SPAN) -> pb.SessionResponse:
        return await self.ask(append=pb.Append(session_id=name, span=codec.encode_span(span)))

    async def failure(self) -> TeacherError:
        """The error that ends the stream."""
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return decode_status(error)
        raise AssertionError("the stream ended without an error")


@asynccontextmanager
async def raw_stream(
    address: str,
    metadata: Metadata = (),
    *,
    run_id: str = "run",
    credentials: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[Raw]:
    """A stream after its handshake."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = grpc.aio.secure_channel(address, credentials)
    async with channel:
        raw = Raw(channel, metadata)
        await raw.hello(run_id)
        yield raw
        raw.call.cancel()


async def eventually(check: Callable[[], bool], timeout_s: float = 6.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < give_up, "did not happen in time"
        await asyncio.sleep(0.02)
