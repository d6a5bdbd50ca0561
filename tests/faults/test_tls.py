"""TLS and mutual TLS of real servers: who gets in, and certificates that change while they run.

Run: pytest tests/faults/test_tls.py
"""

from __future__ import annotations

import asyncio
import signal
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from teacher_client.access import AccessError, TeacherAccess
from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_server.access.tls import TlsFiles, TlsMaterial
from teacher_server.settings import ConfigError
from teacher_wire.errors import NotReadyError, PermissionDeniedError, SessionNotFoundError
from teacher_wire.records import TokenSpan
from teacher_wire.status import decode_error
from tests.faults.access_servers import (
    OPTIONS,
    PROMPT,
    SPAN,
    bearer,
    cli,
    raw_stream,
    tenants_toml,
    write_private,
)
from tests.faults.live_server import LiveServer, live_server
from tests.faults.made_certificates import Authority, Pair
from tests.waiting import LIMIT_S, eventually

pytestmark = pytest.mark.e2e
MORE = TokenSpan(offset=len(SPAN), token_ids=np.array([7], np.int32))


@dataclass(frozen=True, slots=True)
class Mutual:
    """A server that asks for certificates, and what its clients and strangers hold."""

    running: LiveServer
    ca: Path
    vision: Pair
    text: Pair
    nameless: Pair
    stranger: Pair


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mutual]:
    folder = tmp_path_factory.mktemp("mutual")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    pair = ours.issue("teacher", hosts=("127.0.0.1",))
    arguments = ["--no-self-test", *tls_flags(pair), "--tls-client-ca", str(ours.ca)]
    with live_server(folder, *arguments) as running:
        yield Mutual(
            running,
            ours.ca,
            ours.issue("vision"),
            ours.issue("text"),
            ours.issue(""),
            theirs.issue("vision"),
        )


def tls_flags(pair: Pair) -> list[str]:
    return ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]


def channel_credentials(ca: Path, pair: Pair | None = None) -> grpc.ChannelCredentials:
    if pair is None:
        return grpc.ssl_channel_credentials(ca.read_bytes())
    return grpc.ssl_channel_credentials(
        ca.read_bytes(), pair.key.read_bytes(), pair.cert.read_bytes()
    )


def context(ca: Path, pair: Pair | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=ca)
    if pair is not None:
        made.load_cert_chain(pair.cert, pair.key)
    return made


def get(running: LiveServer, path: str, verify: ssl.SSLContext) -> httpx.Response:
    return httpx.get(f"https://{running.http_address}{path}", verify=verify, timeout=LIMIT_S)


def access_of(ca: Path, pair: Pair | None = None, token: str = "") -> TeacherAccess:
    if pair is None:
        return TeacherAccess(tls_ca=ca, token=token)
    return TeacherAccess(tls_ca=ca, tls_cert=pair.cert, tls_key=pair.key, token=token)


async def connect(
    running: LiveServer, access: TeacherAccess, timeout_s: float = LIMIT_S
) -> TeacherClient:
    return await TeacherClient.connect(
        [running.address],
        tokenizer_fingerprint="",
        vocab_size=0,
        run_id="someone",
        connect_timeout_s=timeout_s,
        limits=RetryLimits(max_resends=3),
        access=access,
    )


async def test_grpc_lets_in_nobody_without_a_certificate_of_the_ca(mutual: Mutual) -> None:
    async def refused(access: TeacherAccess, reason: str) -> None:
        with pytest.raises(NotReadyError, match=reason):
            await connect(mutual.running, access, timeout_s=5.0)

    await asyncio.gather(
        refused(TeacherAccess(), "no teacher listens at"),
        refused(access_of(mutual.ca), "no teacher listens at"),
        refused(access_of(mutual.ca, mutual.stranger), "no teacher listens at"),
        refused(access_of(mutual.stranger.cert, mutual.vision), "CERTIFICATE_VERIFY_FAILED"),
    )
    client = await connect(mutual.running, access_of(mutual.ca, mutual.vision))
    assert len((await client.open(PROMPT, OPTIONS, None).append(SPAN)).rows) == len(SPAN)
    await client.aclose()
    with pytest.raises(PermissionDeniedError, match="no common name"):
        await connect(mutual.running, access_of(mutual.ca, mutual.nameless))


async def test_the_certificate_names_the_tenant(mutual: Mutual) -> None:
    address, ca = mutual.running.address, mutual.ca
    vision, text = channel_credentials(ca, mutual.vision), channel_credentials(ca, mutual.text)
    async with raw_stream(address, credentials=vision) as mine:
        async with raw_stream(address, credentials=text, run_id="vision") as other:
            assert (await mine.opened("s")).HasField("opened")
            assert (await mine.scored("s")).HasField("scores")
            refusal = await other.scored("s")
            assert type(decode_error(refusal.error)) is SessionNotFoundError
            assert (await mine.scored("s", MORE)).HasField("scores")
    page = get(mutual.running, "/metrics", context(ca, mutual.text)).text
    assert 'teacher_tokens_scored_total{tenant="vision"}' in page
    assert 'tenant="text"' not in page


def test_http_asks_for_the_certificate_everywhere_but_at_probes(mutual: Mutual) -> None:
    running, ca = mutual.running, mutual.ca
    assert get(running, "/readyz", context(ca)).status_code == 200
    for path in ("/metrics", "/v1/info", "/openapi.json"):
        assert get(running, path, context(ca)).status_code == 401
        assert get(running, path, context(ca, mutual.nameless)).status_code == 403
        assert get(running, path, context(ca, mutual.vision)).status_code == 200
        with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
            get(running, path, context(ca, mutual.stranger))
    url = f"https://{running.http_address}/v1/score"
    body = {"prompt_ids": [1, 2], "response_ids": [3], "k": 2}
    reply = httpx.post(url, json=body, verify=context(ca, mutual.vision))
    assert reply.status_code == 200
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://{running.http_address}/readyz", timeout=LIMIT_S)


def test_http_speaks_nothing_older_than_tls_1_3(mutual: Mutual) -> None:
    old = context(mutual.ca, mutual.vision)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError, match=r"(?i)protocol|version|alert"):
        get(mutual.running, "/healthz", old)


def probe(address: str, *flags: str) -> int:
    command = cli("probe", "--address", address, "--timeout-s", "30", *flags)
    return subprocess.run(command, capture_output=True, timeout=LIMIT_S).returncode


def test_the_probe_speaks_tls(mutual: Mutual, tmp_path: Path) -> None:
    address = mutual.running.address
    flags = ["--tls-ca", str(mutual.ca), *tls_flags(mutual.vision)]
    assert probe(address, *flags) == 0
    assert probe(address, "--tls-ca", str(mutual.ca)) == 2
    assert probe(address, "--tls-ca", str(tmp_path / "absent")) == 2


async def test_certificates_reload_and_no_stream_drops(tmp_path: Path) -> None:
    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    pair = first.issue("teacher", hosts=("127.0.0.1",))
    client_ca, tenants = tmp_path / "client-ca.pem", tmp_path / "tenants.toml"
    client_ca.write_bytes(first.ca.read_bytes())
    write_private(tenants, tenants_toml({"alice": "alice-token"}))
    old, new = first.issue("trainer"), second.issue("trainer")
    flags = [*tls_flags(pair), "--tls-client-ca", str(client_ca), "--tenants-file", str(tenants)]
    with live_server(tmp_path, "--no-self-test", *flags) as running:
        address, token = running.address, bearer("alice-token")
        before = channel_credentials(first.ca, old)
        async with raw_stream(address, token, credentials=before) as live:
            assert (await live.opened("s")).HasField("opened")
            # With both, the certificate is not enough.
            assert get(running, "/v1/info", context(first.ca, old)).status_code == 401

            key = pair.key.read_bytes()
            pair.key.write_text("no key\n")
            await eventually(lambda: "the certificate stays as it was" in running.output)
            assert get(running, "/readyz", context(first.ca)).status_code == 200
            async with raw_stream(address, token, credentials=before):
                pass
            pair.key.write_bytes(key)

            client_ca.write_bytes(second.ca.read_bytes())
            pair.replace_with(second.issue("teacher", hosts=("127.0.0.1",)))
            running.send_signal(signal.SIGHUP)
            after = channel_credentials(second.ca, new)
            await accepted(address, token, after)
            assert get(running, "/readyz", context(second.ca)).status_code == 200
            for ca, trainer in ((first.ca, old), (second.ca, old), (first.ca, new)):
                credentials = channel_credentials(ca, trainer)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await read_info(address, token, credentials)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                get(running, "/v1/info", context(second.ca, old))
            assert (await live.scored("s")).HasField("scores")
            assert (await live.scored("s", MORE)).HasField("scores")


async def read_info(address: str, token: Any, credentials: grpc.ChannelCredentials) -> None:
    async with grpc.aio.secure_channel(address, credentials) as channel:
        ask = channel.unary_unary("/opd.teacher.v1.TeacherService/GetInfo")
        await ask(b"", metadata=token, timeout=LIMIT_S)


async def accepted(address: str, token: Any, credentials: grpc.ChannelCredentials) -> None:
    """Returns once a connection with these credentials works."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                return await read_info(address, token, credentials)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)


def test_the_probe_can_name_a_certificate_that_is_not_for_the_address(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    pair = authority.issue("teacher", hosts=("teacher.internal",))
    with live_server(tmp_path, "--no-self-test", *tls_flags(pair)) as running:
        flags = ["--tls-ca", str(authority.ca)]
        assert probe(running.address, *flags) == 2
        assert probe(running.address, *flags, "--tls-name", "teacher.internal") == 0


def files_of(pair: Pair, client_ca: Path | None = None) -> TlsFiles:
    return TlsFiles(cert=pair.cert, key=pair.key, client_ca=client_ca)


def test_files_that_cannot_be_served_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    good, other = authority.issue("teacher"), authority.issue("teacher")
    locked = authority.issue("teacher", passphrase=b"secret")
    absent, junk = tmp_path / "absent.pem", tmp_path / "junk.pem"
    junk.write_text("junk")
    for files, text in (
        (files_of(Pair(absent, good.key)), f"tls_cert is '{absent}': No such file"),
        (files_of(Pair(good.cert, absent)), f"tls_key is '{absent}': No such file"),
        (files_of(good, absent), f"tls_client_ca is '{absent}': No such file"),
        (files_of(Pair(good.cert, locked.key)), f"tls_key {locked.key} is encrypted"),
        (files_of(Pair(good.cert, other.key)), f"tls_key {other.key} does not match the cert"),
        (files_of(Pair(junk, good.key)), f"tls_cert {junk} must be PEM certificates"),
        (files_of(Pair(good.cert, junk)), f"tls_key {junk} must be the PEM key of tls_cert"),
        (files_of(good, junk), f"tls_client_ca {junk} must be PEM certificates"),
    ):
        with pytest.raises(ConfigError) as caught:
            TlsMaterial(files)
        assert text in str(caught.value)
    done = subprocess.run(
        cli("serve", "--engine", "fake", *tls_flags(Pair(good.cert, other.key))),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 2
    assert "does not match the certificate" in done.stderr
    assert "Traceback" not in done.stderr


def test_grpc_is_handed_a_certificate_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path, "ours")
    pair = authority.issue("teacher")
    asked: list[Callable[[], object]] = []
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda *args: asked.append(args[1]))
    material = TlsMaterial(files_of(pair))
    material.grpc_credentials()
    ask = asked[0]
    assert ask() is None  # the one it began with
    pair.replace_with(authority.issue("teacher"))
    assert material.poll(force=True)
    assert [ask() is None for _ in range(3)] == [False, True, True]


def test_a_key_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    pair = Authority(tmp_path, "ours").issue("teacher")
    TlsMaterial(files_of(pair))
    pair.key.chmod(0o644)
    with pytest.raises(ConfigError, match=r"has mode 0644: .*; chmod o-r") as caught:
        TlsMaterial(files_of(pair))
    assert f"tls_key: {pair.key} holds the server's private key" in str(caught.value)


async def test_the_trainers_files_are_named_when_they_are_no_use(tmp_path: Path) -> None:
    absent, empty, two = (tmp_path / name for name in ("absent", "empty", "two"))
    empty.write_text(" \n")
    two.write_text("secret-one secret-two")

    def use(access: TeacherAccess) -> None:
        access.metadata()
        access.channel("127.0.0.1:1", ())

    for access, text in (
        (TeacherAccess(token_file=absent), f"teacher.token_file is '{absent}': No such file"),
        (TeacherAccess(token_file=empty), f"teacher.token_file '{empty}' is empty"),
        (TeacherAccess(token_file=two), f"teacher.token_file '{two}' holds 21 characters"),
        (TeacherAccess(tls_ca=absent), f"teacher.tls_ca is '{absent}': No such file"),
    ):
        with pytest.raises(AccessError) as caught:
            use(access)
        assert text in str(caught.value)
        assert "secret" not in str(caught.value)
    assert "secret" not in repr(TeacherAccess(token="secret"))


async def test_a_token_without_tls_warns_beyond_loopback(caplog: pytest.LogCaptureFixture) -> None:
    for endpoint, warns in (("127.0.0.1:1", False), ("[::1]:1", False), ("teacher:1", True)):
        caplog.clear()
        await TeacherAccess(token="secret").channel(endpoint, ()).close()
        assert ("in the clear" in caplog.text) is warns
        assert "secret" not in caplog.text
