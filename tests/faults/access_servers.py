"""Files of tenants, and streams that show a token."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from teacher_wire import codec
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import ScoreOptions, TokenSpan
from tests.teacher.rpc.raw_streams import Raw

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


class Asking(Raw):
    """A stream of questions with an answer each."""

    async def hello(self, run_id: str = "run") -> None:
        await self.send(hello=pb.Hello(protocol_version=1, run_id=run_id))
        assert (await self.call.read()).HasField("welcome")

    async def ask(self, **message: Any) -> pb.SessionResponse:
        await self.send(**message)
        answer: pb.SessionResponse = await self.call.read()
        return answer

    async def opened(self, name: str) -> pb.SessionResponse:
        prompt, options = codec.encode_ids(PROMPT), codec.encode_options(OPTIONS)
        return await self.ask(open=pb.Open(session_id=name, prompt_ids=prompt, options=options))

    async def scored(self, name: str, span: TokenSpan = SPAN) -> pb.SessionResponse:
        return await self.ask(append=pb.Append(session_id=name, span=codec.encode_span(span)))


def stub_at(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def raw_stream(
    address: str,
    metadata: Metadata = (),
    *,
    run_id: str = "run",
    credentials: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[Asking]:
    """A stream after its handshake."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = grpc.aio.secure_channel(address, credentials)
    async with channel:
        raw = Asking(stub_at(channel), metadata)
        await raw.hello(run_id)
        yield raw
        raw.call.cancel()
