"""Nobody gets at a teacher, or at another tenant's sessions, without the right token.

Run: pytest tests/faults/test_access.py
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from teacher_client.access import TeacherAccess
from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_server.access.auth import Access
from teacher_server.access.tenants_file import TenantsFile
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.http.clients.paths import SHAPED_PATHS
from teacher_server.http.middleware import OPEN_PATHS, is_open
from teacher_server.process.parts import Limits, TeacherParts
from teacher_server.testing import teacher_info
from teacher_wire import codec
from teacher_wire.errors import SessionNotFoundError, UnauthenticatedError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import TokenSpan
from teacher_wire.status import decode_error, decode_status
from tests.faults.access_servers import (
    OPTIONS,
    PROMPT,
    SPAN,
    Metadata,
    bearer,
    cli,
    raw_stream,
    stub_at,
    tenants_toml,
    write_private,
)
from tests.faults.live_server import LiveServer, live_server
from tests.teacher.rpc.raw_streams import Raw
from tests.waiting import LIMIT_S, eventually

pytestmark = pytest.mark.e2e

ALICE, BOB, CAROL = ("alice-token-" + "a" * 31, "bob-token-" + "b" * 33, "carol-token-" + "c" * 31)
EXPIRED = "expires = 2026-01-01T00:00:00+01:00"
TENANTS = tenants_toml({"alice": ALICE, "bob": BOB, "carol": CAROL}, carol=EXPIRED)


def basic(user: str, password: str = "") -> str:
    """What clients make of the user part of a URL."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


BAD_HEADERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "wrong scheme": (f"Digest {ALICE}",),
    "Basic without a user": (basic(""),),
    "Basic with another token": (basic("x" * 43),),
    "Basic with a password": (basic("someone", ALICE),),
    "Basic that is no base64": (f"Basic {ALICE}!",),
    "no scheme": (ALICE,),
    "empty": ("Bearer",),
    "wrong token": ("Bearer " + "x" * 43,),
    "nearly right": (f"Bearer {ALICE[:-1]}",),
    "too long": ("Bearer " + "x" * 5000,),
    "expired": (f"Bearer {CAROL}",),
    "two tokens": (f"Bearer {ALICE}", f"Bearer {BOB}"),
}
MORE = TokenSpan(offset=len(SPAN), token_ids=np.array([7], np.int32))
HEALTH = "grpc.health.v1.Health"
BIG_IDS = (123_457, 145_679, 167_891, 178_913)
"""Token ids that nothing else in a log looks like."""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A teacher with three tenants, one of them expired, that logs all it can."""
    folder = tmp_path_factory.mktemp("guarded")
    write_private(folder / "tenants.toml", TENANTS)
    arguments = ("--tenants-file", str(folder / "tenants.toml"), "--log-level", "debug")
    with live_server(
        folder, *arguments, "--fake-vocab-size", "200000", "--no-self-test"
    ) as running:
        yield running


def metadata_of(headers: tuple[str, ...]) -> Metadata:
    return tuple(("authorization", header) for header in headers)


async def served_methods(channel: grpc.aio.Channel) -> list[MethodDescriptor]:
    """Every method of every service that the server says it has."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
    call = stub.ServerReflectionInfo(metadata=bearer(ALICE))
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = [service.name for service in (await call.read()).list_services_response.service]
    call.cancel()
    services = [descriptor_pool.Default().FindServiceByName(name) for name in names]
    return [method for service in services for method in service.methods]


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


async def called(
    channel: grpc.aio.Channel, method: MethodDescriptor, metadata: Metadata
) -> grpc.StatusCode:
    """How a call ends whose message is no message at all."""
    many = "stream" if method.client_streaming else "unary"
    answers = "stream" if method.server_streaming else "unary"
    ask = getattr(channel, f"{many}_{answers}")(path_of(method))
    junk = b"\xff\xff\xff"
    call = ask(
        iter([junk]) if method.client_streaming else junk, metadata=metadata, timeout=LIMIT_S
    )
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError:
        pass
    code: grpc.StatusCode = await call.code()
    return code


async def test_every_rpc_but_health_refuses_strangers_before_it_reads(guarded: LiveServer) -> None:
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        methods = await served_methods(channel)
        paths = {path_of(method) for method in methods}
        assert {"/opd.teacher.v1.TeacherService/Session", f"/{HEALTH}/Watch"} <= paths
        assert any(path.endswith("/ServerReflectionInfo") for path in paths)
        for method in methods:
            is_health = method.containing_service.full_name == HEALTH
            for name, headers in BAD_HEADERS.items():
                code = await called(channel, method, metadata_of(headers))
                refused = code is grpc.StatusCode.UNAUTHENTICATED
                assert refused is not is_health, f"{path_of(method)}, {name}: {code}"
            code = await called(channel, method, bearer(ALICE))
            # What is sent is no protobuf: our service says so, others let gRPC speak.
            assert code in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.UNKNOWN,
            ), f"{path_of(method)}: {code}"


async def test_a_method_that_does_not_exist_is_refused_alike(guarded: LiveServer) -> None:
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        unknown = channel.unary_unary("/opd.teacher.v1.TeacherService/Guess")
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            (bearer(ALICE), grpc.StatusCode.UNIMPLEMENTED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unknown(b"", metadata=metadata, timeout=LIMIT_S)
            assert caught.value.code() is code


async def test_health_needs_no_token(guarded: LiveServer) -> None:
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_stream_that_writes_at_once_sees_why_it_is_refused(
    guarded: LiveServer,
) -> None:
    # More than flow control lets through at once, so that the client is still writing when the
    # refusal would come, were the message not read.
    hello = pb.Hello(protocol_version=1, run_id="x" * (2 << 20))
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        for _ in range(30):
            raw = Raw(stub_at(channel), metadata_of(BAD_HEADERS["wrong token"]))
            await raw.send(hello=hello)
            assert type(await raw.failure()) is UnauthenticatedError


async def test_a_silent_stranger_is_not_kept(guarded: LiveServer) -> None:
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        failures = await asyncio.gather(*(Raw(stub_at(channel)).failure() for _ in range(40)))
        assert {type(failure) for failure in failures} == {UnauthenticatedError}


@pytest.mark.parametrize("on_absent", ["wait", "error"])
async def test_the_client_never_retries_a_refusal(guarded: LiveServer, on_absent: Any) -> None:
    before = count(guarded, "grpc_server_handled_total", 'grpc_code="UNAUTHENTICATED"')
    for access in (TeacherAccess(), TeacherAccess(token="x" * 43), TeacherAccess(token=CAROL)):
        with pytest.raises(UnauthenticatedError):
            await connect(guarded, access, on_absent=on_absent)
    after = count(guarded, "grpc_server_handled_total", 'grpc_code="UNAUTHENTICATED"')
    assert after == before + 3


async def test_the_client_shows_the_token_of_its_file(guarded: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{BOB}\n")
    before = scored(guarded, "bob")
    client = await connect(guarded, TeacherAccess(token_file=path, token="not this one"))
    scores = await client.open(PROMPT, OPTIONS, None).append(SPAN)
    assert len(scores.rows) == len(SPAN)
    assert len((await client.score(PROMPT, SPAN, OPTIONS, None)).rows) == len(SPAN)
    await client.aclose()
    assert scored(guarded, "bob") == before + 2 * len(SPAN)


async def connect(running: LiveServer, access: TeacherAccess, **changes: Any) -> TeacherClient:
    return await TeacherClient.connect(
        [running.address],
        tokenizer_fingerprint="",
        vocab_size=0,
        run_id="someone",
        access=access,
        **({"connect_timeout_s": LIMIT_S, "limits": RetryLimits(max_resends=3)} | changes),
    )


def sample(running: LiveServer) -> str:
    url = f"http://{running.http_address}/metrics"
    reply = httpx.get(url, headers={"authorization": f"Bearer {ALICE}"})
    assert reply.status_code == 200
    return reply.text


def count(running: LiveServer, family: str, label: str) -> float:
    lines = sample(running).splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith(family) and label in x)


def scored(running: LiveServer, tenant: str) -> float:
    return count(running, "teacher_tokens_scored_total", f'tenant="{tenant}"')


async def test_another_tenants_session_looks_like_none(guarded: LiveServer) -> None:
    async with AsyncExitStack() as stack:
        alice, bob = [
            # The run_id is a label: claiming another's name changes nothing.
            await stack.enter_async_context(
                raw_stream(guarded.address, bearer(token), run_id="alice")
            )
            for token in (ALICE, BOB)
        ]
        absent = await bob.scored("shared-name")
        assert type(decode_error(absent.error)) is SessionNotFoundError
        closed = await bob.ask(close=pb.Close(session_id="shared-name"))
        assert (await alice.opened("shared-name")).HasField("opened")
        mine = await alice.scored("shared-name")
        assert mine.scores.rows.count == len(SPAN)
        forbidden = await bob.scored("shared-name")
        assert forbidden.SerializeToString(True) == absent.SerializeToString(True)
        again = await bob.ask(close=pb.Close(session_id="shared-name"))
        assert again.SerializeToString(True) == closed.SerializeToString(True)
        # Neither of them, nor a session of the same name, has touched it.
        assert (await bob.opened("shared-name")).HasField("opened")
        assert (await alice.scored("shared-name", MORE)).scores.rows.offset == len(SPAN)
        assert (await bob.scored("shared-name", MORE)).HasField("error")


def test_http_has_no_way_to_name_a_session() -> None:
    schema = json.dumps(http_app().openapi())
    assert "/v1/score" in schema
    assert "session" not in schema.replace("max_sessions", "")  # a limit, which /v1/info tells


def http_app() -> Any:
    engine = FakeEngine()
    return TeacherParts(engine, teacher_info(engine), access=Access(), limits=Limits()).http_app()


async def test_every_http_route_but_probes_and_page_needs_a_token(guarded: LiveServer) -> None:
    routes = [(m, r.path) for r in http_app().routes for m in sorted(r.methods)]
    assert {("POST", "/v1/score"), ("GET", "/metrics"), ("GET", "/healthz")} <= set(routes)
    probes = {"/healthz", "/readyz", "/health", "/health/", "/ping"}
    assert {"/", "/docs", *probes} == OPEN_PATHS
    assert {path for _, path in routes if is_open(path)} == {*OPEN_PATHS, "/page/{name}"}
    routes += [("GET", "/no/such/path"), ("GET", "/page")]
    async with httpx.AsyncClient(base_url=f"http://{guarded.http_address}") as client:
        for method, path in routes:
            for name, headers in BAD_HEADERS.items():
                given = [("authorization", header) for header in headers]
                reply = await client.request(method, path, headers=given, content=b"\xff")
                refused = reply.status_code == 401
                assert refused is not is_open(path), f"{method} {path}, {name}"
                offered = "Bearer, Basic" if path in SHAPED_PATHS else "Bearer"
                assert not refused or reply.headers["www-authenticate"].startswith(offered)
            good = {"authorization": f"Bearer {ALICE}"}
            reply = await client.request(method, path, headers=good, content=b"\xff")
            assert reply.status_code not in (401, 403), f"{method} {path}"


@pytest.mark.parametrize("header", [f"bearer {BOB}", basic(BOB), None])
def test_a_token_counts_over_http_for_its_tenant(guarded: LiveServer, header: str | None) -> None:
    before = scored(guarded, "bob")
    # Without a header it is the user of the URL.
    url = f"http://{'' if header else f'{BOB}:@'}{guarded.http_address}/v1/score"
    body = {"prompt_ids": [1, 2], "response_ids": [3, 4, 5], "k": 2}
    headers = {"authorization": header} if header else {}
    assert httpx.post(url, json=body, headers=headers).status_code == 200
    assert scored(guarded, "bob") == before + 3


def test_a_client_that_sends_no_token_is_told_how(guarded: LiveServer) -> None:
    reply = httpx.get(f"http://{guarded.http_address}/v1/models")
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"].startswith("Bearer, Basic realm=")
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("AuthenticationError", 401)
    assert "http://TOKEN:@HOST:PORT" in error["message"]
    assert "authorization: Bearer TOKEN" in error["message"]


async def test_tenants_reload_and_a_revoked_stream_ends(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    write_private(path, tenants_toml({"alice": ALICE, "bob": BOB}))
    with live_server(tmp_path, "--tenants-file", str(path), "--open-metrics") as running:
        address = running.address
        assert httpx.get(f"http://{running.http_address}/metrics").status_code == 200
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            alice = await enter(raw_stream(address, bearer(ALICE)))
            bob = await enter(raw_stream(address, bearer(BOB)))
            assert (await alice.opened("s")).HasField("opened")

            write_private(path, "[tenants.alice]\ntoken_sha = []\n")
            await eventually(lambda: "the tenants stay as they were" in running.output)
            assert "did you mean 'token_sha256'?" in running.output
            assert (await bob.opened("s")).HasField("opened")

            client = await connect(running, TeacherAccess(token=BOB), on_absent="wait")
            session = client.open(PROMPT, OPTIONS, None)
            await session.append(SPAN)
            soon = (datetime.now(UTC) + timedelta(seconds=1.5)).isoformat()
            write_private(
                path, tenants_toml({"alice": ALICE, "dora": CAROL}, dora=f"expires = {soon}")
            )
            running.send_signal(signal.SIGHUP)
            revoked = await bob.failure()
            assert (type(revoked), revoked.message) == (
                UnauthenticatedError,
                "the bearer token is not known",
            )
            # A client that would wait for its teacher for ever does not wait for its token.
            with pytest.raises(UnauthenticatedError):
                await asyncio.wait_for(session.append(MORE), 10)
            await client.aclose()
            dora = await enter(raw_stream(address, bearer(CAROL)))
            expired = await asyncio.wait_for(dora.failure(), 6)
            assert type(expired) is UnauthenticatedError
            assert "expired at" in expired.message
            assert (await alice.scored("s")).scores.rows.count == len(SPAN)
        assert running.process.poll() is None


async def test_no_token_and_no_token_id_is_in_the_log(guarded: LiveServer) -> None:
    """After everything above, and after every kind of failure with ids that are easy to find."""
    ids = np.array(BIG_IDS, np.int32)
    span = TokenSpan(offset=0, token_ids=ids)
    async with raw_stream(guarded.address, bearer(ALICE)) as raw:
        options = codec.encode_options(OPTIONS)
        opening = pb.Open(session_id="s", prompt_ids=codec.encode_ids(ids), options=options)
        assert (await raw.ask(open=opening)).HasField("opened")
        assert (await raw.scored("s", span)).scores.rows.count == len(ids)
        far = TokenSpan(offset=99, token_ids=ids)
        outside = TokenSpan(offset=0, token_ids=ids + 100_000)
        for name, wrong in (("s", far), ("s", outside), ("absent", span)):
            assert (await raw.scored(name, wrong)).HasField("error")
        await raw.call.write(pb.SessionRequest(hello=pb.Hello(run_id=ALICE)))
    body = {"prompt_ids": list(BIG_IDS), "response_ids": list(BIG_IDS), "k": 2}
    async with httpx.AsyncClient(base_url=f"http://{guarded.http_address}") as client:
        for token in (ALICE, CAROL, "wrong" * 8):
            for changes in ({}, {"k": -1}, {"response_ids": [BIG_IDS[0] + 100_000]}):
                headers = {"authorization": f"Bearer {token}"}
                await client.post("/v1/score", json=body | changes, headers=headers)
            await client.get(f"/v1/info?access_token={token}")
    log = guarded.output
    assert "teacher-server ready" in log
    secrets = [ALICE, BOB, CAROL, "wrong" * 8, "x" * 43]
    secrets += [hashlib.sha256(token.encode()).hexdigest() for token in (ALICE, BOB, CAROL)]
    secrets += [str(i) for i in (*BIG_IDS, *(i + 100_000 for i in BIG_IDS))]
    assert [secret for secret in secrets if secret in log] == []


def test_the_printed_lines_admit_the_printed_token(tmp_path: Path) -> None:
    command = cli("token", "team_a-1")
    outputs = [
        subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
        for _ in range(2)
    ]
    lines = outputs[0].splitlines()
    token = lines[1]
    assert outputs[0] != outputs[1]
    assert len(token) == 43
    path = tmp_path / "tenants.toml"
    write_private(path, outputs[0].split("\n\n")[1])
    assert TenantsFile(path).tenant_of(token) == "team_a-1"
    assert token not in path.read_text()
    refused = subprocess.run(cli("token", "a b"), capture_output=True, text=True, timeout=LIMIT_S)
    assert refused.returncode == 2
    assert "'a b' must be 1 to 64 letters" in refused.stderr


async def test_a_refusal_carries_its_class(guarded: LiveServer) -> None:
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        get_info = channel.unary_unary("/opd.teacher.v1.TeacherService/GetInfo")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get_info(b"", timeout=LIMIT_S)
    error = decode_status(caught.value)
    assert type(error) is UnauthenticatedError
    assert error.message.startswith("no bearer token")
