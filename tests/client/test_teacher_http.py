"""The client's HTTP side against real servers. Run: pytest tests/client/test_teacher_http.py"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import numpy as np
import pytest

import teacher_client
from teacher_client import AccessError, TeacherAccess, TeacherHttp
from teacher_wire.errors import (
    DeadlineError,
    InvalidRequestError,
    NotReadyError,
    UnauthenticatedError,
)
from teacher_wire.records import LogprobDtype, ScoreOptions, Verdict
from tests.client.client_sessions import POLICY, PROMPT, client_of, make_span
from tests.faults.access_servers import tenants_toml, write_private
from tests.faults.live_server import LiveServer, live_server
from tests.faults.made_certificates import Authority
from tests.faults.scrape import Scrape
from tests.teacher.scoring.fake_rows import assert_rows_equal
from tests.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
FULL = ScoreOptions(k=16, want_entropy=True, want_rank=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ["--fake-vocab-size", "512", "--no-self-test"]
    with live_server(tmp_path_factory.mktemp("teacher"), *flags) as running:
        yield running


@pytest.fixture
def http(teacher: LiveServer) -> Iterator[TeacherHttp]:
    with TeacherHttp(f"http://{teacher.http_address}") as made:
        yield made


@pytest.mark.parametrize("dtype", LogprobDtype)
@pytest.mark.parametrize("policy", [None, POLICY])
async def test_http_and_grpc_give_the_same_records(
    teacher: LiveServer, http: TeacherHttp, dtype: LogprobDtype, policy: None
) -> None:
    span, options = make_span(60), replace(FULL, logprob_dtype=dtype)
    async with client_of(teacher.address) as client:
        expected = await client.score(PROMPT, span, options, policy)
        assert http.info() == client.info
    found = http.score(PROMPT, span, options, policy)
    assert_rows_equal(found.rows, expected.rows)
    for name in found.rows.__dataclass_fields__:
        one, other = getattr(found.rows, name), getattr(expected.rows, name)
        assert getattr(one, "dtype", type(one)) == getattr(other, "dtype", type(other)), name
    assert replace(found, rows=expected.rows, timing=expected.timing) == expected
    assert found.verdict is (Verdict.CONTINUE if policy is None else Verdict.TRUNCATE)
    assert found.timing.computed_tokens == expected.timing.computed_tokens


async def test_ids_take_no_part_as_over_grpc(teacher: LiveServer, http: TeacherHttp) -> None:
    whole = make_span(20)
    assert whole.candidate_ids is not None
    ids, candidates = whole.token_ids % 400, whole.candidate_ids % 400
    span = replace(whole, token_ids=ids, candidate_ids=candidates)
    options = replace(FULL, excluded_ids=((400, 450), (500, 512)))
    async with client_of(teacher.address) as client:
        expected = await client.score(PROMPT, span, options, None)
    found = http.score(PROMPT, span, options)
    assert_rows_equal(found.rows, expected.rows)
    assert not np.isin(found.rows.topk_ids, [*range(400, 450), *range(500, 512)]).any()
    with pytest.raises(InvalidRequestError, match="goes up to 513, the vocabulary has 512 ids"):
        http.score(PROMPT, span, replace(FULL, excluded_ids=((400, 513),)))


def test_a_reader_who_leaves_in_the_middle_stops_the_work(tmp_path: Path) -> None:
    body = {"prompt_ids": [1], "response_ids": [2] * 6000, "k": 2}
    headers = {"accept": "application/x-ndjson"}
    flags = ["--fake-tokens-per-s", "5000", "--no-self-test"]
    with live_server(tmp_path, *flags) as running:
        url = f"http://{running.http_address}/v1/analyze"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=LIMIT_S) as reply:
            lines = reply.iter_lines()
            assert json.loads(next(lines))["num_tokens"] == 6000
            assert json.loads(next(lines))["offset"] == 0
        wait_until(lambda: Scrape(running).value("teacher_batch_sessions") == 0)
        wait_until(lambda: Scrape(running).value("teacher_queue_depth") == 0)
        scored = Scrape(running).by("teacher_tokens_scored_total", "tenant")["http"]
        assert scored < 6000


def test_what_the_teacher_refuses_is_raised_as_over_grpc(http: TeacherHttp) -> None:
    with pytest.raises(InvalidRequestError, match=r"token_ids\[0\] is 600"):
        http.score(PROMPT, replace(make_span(1), token_ids=np.array([600], np.int32)), FULL)


def test_tokens_and_certificates_are_those_of_the_access(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    server, trainer = ours.issue("teacher", hosts=("127.0.0.1",)), ours.issue("trainer")
    tenants, token, empty = (tmp_path / name for name in ("tenants.toml", "token", "empty"))
    write_private(tenants, tenants_toml({"trainer": "a-token"}))
    write_private(token, "a-token\n")
    write_private(empty, "")
    flags = ["--tls-cert", str(server.cert), "--tls-key", str(server.key), "--no-self-test"]
    flags += ["--tls-client-ca", str(ours.ca), "--tenants-file", str(tenants)]
    mutual = TeacherAccess(tls_ca=ours.ca, tls_cert=trainer.cert, tls_key=trainer.key)
    with live_server(tmp_path, *flags) as running:
        url = f"https://{running.http_address}"
        with TeacherHttp(url, access=replace(mutual, token_file=token)) as http:
            assert http.info().engine == "fake"
            # The file is read at each question.
            write_private(token, "another")
            with pytest.raises(UnauthenticatedError):
                http.info()
        with TeacherHttp(url) as stranger, pytest.raises(NotReadyError, match="CERTIFICATE"):
            stranger.info()
    for access, text in (
        (replace(mutual, tls_ca=tmp_path / "absent"), "teacher.tls_ca is .*absent': No such file"),
        (replace(mutual, tls_ca=empty), "no TLS with .*empty"),
        (replace(mutual, tls_key=server.key), "no TLS with .*: .*MISMATCH"),
    ):
        with pytest.raises(AccessError, match=text):
            TeacherHttp(url, access=access)


@pytest.mark.parametrize(("url", "warns"), [("http://[::1]:1", False), ("http://teacher:1", True)])
def test_a_token_without_tls_warns_beyond_loopback(
    url: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    TeacherHttp(url, access=TeacherAccess(token="secret")).close()
    assert ("in the clear" in caplog.text) is warns
    assert "secret" not in caplog.text


class Stranger(BaseHTTPRequestHandler):
    """Answers as something that is no teacher would, or not at all."""

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {
        "/html/v1/info": (502, b"<h1>Bad Gateway</h1>"),
        "/list/v1/info": (200, b"[1]"),
        "/other/v1/info": (404, b'{"detail": "Not Found"}'),
        "/text/v1/info": (500, b'{"error": "no"}'),
    }

    def do_GET(self) -> None:
        if self.path not in self.answers:
            self.connection.recv(1)
            return
        status, body = self.answers[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stranger() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_whoever_is_no_teacher_is_not_taken_for_one() -> None:
    with stranger() as url:
        for path, (status, _) in Stranger.answers.items():
            with (
                TeacherHttp(url + path.removesuffix("/v1/info")) as http,
                pytest.raises(NotReadyError, match=f"{path} answered HTTP {status} and no JSON"),
            ):
                http.info()
        with (
            TeacherHttp(f"{url}/silent", timeout_s=0.2) as http,
            pytest.raises(DeadlineError, match=r"gave no answer in 0\.2 s"),
        ):
            http.info()
    with TeacherHttp(url) as http, pytest.raises(NotReadyError, match="cannot be reached"):
        http.info()


def test_the_package_exports_its_names_and_imports_none_of_them_before() -> None:
    assert {getattr(teacher_client, name).__name__ for name in teacher_client.__all__} == set(
        teacher_client.__all__
    )
    assert set(teacher_client.__all__) <= set(dir(teacher_client))
    with pytest.raises(AttributeError, match="'teacher_client' has no attribute 'Student'"):
        _ = teacher_client.Student
    code = "import sys, teacher_client; print(*{'grpc', 'httpx', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
