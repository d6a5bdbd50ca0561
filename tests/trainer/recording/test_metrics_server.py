"""Who asks for a trainer's metrics, and how, takes nothing of the trainer's for good.

Run: pytest tests/trainer/recording/test_metrics_server.py
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from student_trainer.recording import metrics_server
from student_trainer.recording.metrics import TrainerMetrics, served
from tests.waiting import LIMIT_S, wait_until

HALF = b"GET /metrics HTTP/1.1\r\nHost:"


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = free.getsockname()[1]
    with served(TrainerMetrics(run="r", student="s", steps=9), "127.0.0.1", found):
        yield found


@contextmanager
def half_a_request(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as connection:
        connection.sendall(HALF)
        yield connection


def status(port: int, path: str, method: str = "GET") -> int | None:
    """None where the connection is closed without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    except (http.client.RemoteDisconnected, ConnectionError):
        return None
    finally:
        connection.close()


def test_metrics_are_at_their_path_alone(port: int) -> None:
    assert status(port, "/metrics") == status(port, "/metrics?name[]=trainer_info") == 200
    for path in ("/", "/metricsx", "/metrics/x", "/favicon.ico"):
        assert status(port, path) == 404
    assert status(port, "/metrics", "POST") == 501


def test_a_request_that_never_ends_is_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < metrics_server.Handler.timeout <= 30
    monkeypatch.setattr(metrics_server.Handler, "timeout", 0.1)
    with half_a_request(port) as connection:
        assert connection.recv(1) == b""


def test_connections_have_a_limit_and_those_that_end_make_room(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_server.Handler, "timeout", 10 * LIMIT_S)
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(metrics_server.MAX_CONNECTIONS):
            stack.enter_context(half_a_request(port))
        for _ in range(3):
            assert status(port, "/metrics") is None
        assert threading.active_count() <= before + metrics_server.MAX_CONNECTIONS
    wait_until(lambda: status(port, "/metrics") == 200)
    assert capfd.readouterr() == ("", "")
