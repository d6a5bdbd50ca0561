"""What the HTTP side refuses, bounds and hides. Run: pytest tests/teacher/http/test_http_edge.py"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from teacher_server.access.caller import Caller
from teacher_server.http import middleware
from teacher_wire.errors import (
    ERROR_CODES,
    CapacityError,
    EngineError,
    TeacherError,
    UnauthenticatedError,
)
from tests.teacher.http.http_teacher import PROMPT, RESPONSE, Teacher, error_of
from tests.waiting import LIMIT_S, eventually


@pytest.fixture
def teacher() -> Teacher:
    return Teacher()


@pytest.mark.parametrize("error_class", ERROR_CODES)
async def test_every_error_class_leaves_with_its_status_and_hint(
    teacher: Teacher, error_class: type[TeacherError]
) -> None:
    teacher.sessions.failure = error_class("the words", retry_after_ms=2500)
    response = await teacher.post("/v1/score", {"prompt_ids": PROMPT, "response_ids": RESPONSE})
    code, error = ERROR_CODES[error_class], error_of(response)
    assert response.status_code == code.http
    assert (error["type"], error["retryable"]) == (error_class.__name__, code.retryable)
    if error_class is not EngineError:
        assert (error["message"], error["retry_after_ms"]) == ("the words", 2500)
        assert response.headers["retry-after"] == "3"
    counted = f'teacher_errors_total{{type="{error_class.__name__}"}} 1.0'
    assert counted in teacher.metrics.render().decode()


@pytest.mark.parametrize("failure", [RuntimeError("/secret/path"), EngineError("/secret/path")])
async def test_an_internal_failure_is_logged_under_its_request_id_and_not_told(
    teacher: Teacher, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    teacher.sessions.failure = failure
    with caplog.at_level(logging.ERROR):
        response = await teacher.client.post(
            "/v1/score",
            json={"prompt_ids": PROMPT, "response_ids": RESPONSE},
            headers={"x-request-id": "run-7.step-3"},
        )
    error = error_of(response)
    assert (response.status_code, error["type"]) == (500, "EngineError")
    assert response.headers["x-request-id"] == "run-7.step-3"
    assert "run-7.step-3" in error["message"]
    assert "secret" not in response.text
    assert "run-7.step-3" in caplog.text
    assert "/secret/path" in caplog.text


async def test_a_request_id_that_could_forge_a_log_line_is_replaced(teacher: Teacher) -> None:
    response = await teacher.client.get("/healthz", headers={"x-request-id": "a b"})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_is_not(
    announced: bool,
) -> None:
    limit = 400
    teacher = Teacher(max_body_bytes=limit)

    async def send(size: int) -> httpx.Response:
        text = json.dumps({"prompt_ids": PROMPT, "response_ids": RESPONSE}).ljust(size).encode()

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, size, 100):
                yield text[start : start + 100]

        return await teacher.client.post(
            "/v1/score",
            content=text if announced else pieces(),
            headers={"content-type": "application/json"},
        )

    assert (await send(limit)).status_code == 200
    refused = await send(limit + 1)
    assert (refused.status_code, error_of(refused)["type"]) == (413, "MessageTooLargeError")
    assert str(limit) in error_of(refused)["message"]


async def test_a_body_that_never_ends_is_cut_off(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.05)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    response = await teacher.client.post("/v1/score", content=pieces())
    assert (response.status_code, error_of(response)["type"]) == (504, "DeadlineError")


async def test_requests_past_the_bound_are_turned_away_with_a_hint(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "MAX_BODIES_IN_FLIGHT", 2)
    release, entered = asyncio.Event(), []
    inner = teacher.sessions.score_once

    async def slow(*args: Any, **kwargs: Any) -> Any:
        entered.append(1)
        await release.wait()
        return await inner(*args, **kwargs)

    teacher.sessions.score_once = slow
    body = {"prompt_ids": PROMPT, "response_ids": RESPONSE}
    waiting = [asyncio.create_task(teacher.post("/v1/score", body)) for _ in range(2)]
    await eventually(lambda: len(entered) == 2)
    refused = await teacher.post("/v1/score", body)
    assert refused.status_code == ERROR_CODES[CapacityError].http
    assert refused.headers["retry-after"] == "1"
    assert (await teacher.client.get("/healthz")).status_code == 200
    release.set()
    assert [r.status_code for r in await asyncio.gather(*waiting)] == [200, 200]
    assert (await teacher.post("/v1/score", body)).status_code == 200


async def test_v1_needs_the_token_and_names_the_tenant() -> None:
    def authenticate(caller: Caller) -> str:
        if caller.authorization != ["Bearer good"]:
            raise UnauthenticatedError("no or wrong token")
        return "team-a"

    teacher = Teacher(authenticate=authenticate)
    body = {"prompt_ids": PROMPT, "response_ids": RESPONSE}
    for headers in ({}, {"authorization": "Bearer bad"}, {"authorization": "Basic good"}):
        posts = [("POST", f"/v1/{name}") for name in ("score", "analyze", "compare")]
        for method, path in (("GET", "/v1/info"), *posts):
            response = await teacher.client.request(method, path, json=body, headers=headers)
            assert (response.status_code, error_of(response)["type"]) == (
                401,
                "UnauthenticatedError",
            )
            assert response.headers["www-authenticate"] == "Bearer"
    assert teacher.engine.num_queries == 0
    headers = {"authorization": "Bearer good"}
    assert (await teacher.client.post("/v1/score", json=body, headers=headers)).status_code == 200
    assert 'teacher_tokens_scored_total{tenant="team-a"} 6.0' in teacher.metrics.render().decode()
    for path in ("/", "/healthz", "/readyz"):
        assert (await teacher.client.get(path)).status_code == 200
    assert (await teacher.client.get("/metrics")).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/score", 405), ("POST", "/healthz", 405)],
)
async def test_a_wrong_path_or_method_has_the_error_shape(
    teacher: Teacher, method: str, path: str, status: int
) -> None:
    response = await teacher.client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["retryable"] is False


async def test_metrics_count_requests_by_route_and_never_by_raw_path(teacher: Teacher) -> None:
    await teacher.client.get("/healthz")
    await teacher.client.get("/nowhere/" + "x" * 50)
    response = await teacher.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'teacher_http_request_seconds_count{route="/healthz",status="200"} 1.0' in response.text
    assert 'route="unrouted",status="404"' in response.text
    assert "xxx" not in response.text
    assert f'weights="{"w" * 64}"' in response.text


async def test_a_client_that_leaves_cancels_its_work(teacher: Teacher) -> None:
    running, cancelled = asyncio.Event(), asyncio.Event()

    async def endless(*_: Any, **__: Any) -> Any:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    teacher.sessions.score_once = endless  # type: ignore[method-assign]
    body = json.dumps({"prompt_ids": PROMPT, "response_ids": RESPONSE}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await running.wait()
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/score",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    async with asyncio.timeout(LIMIT_S):
        await teacher.app(scope, receive, send)
    assert cancelled.is_set()
    assert sent == []


@pytest.mark.parametrize("path", ["/page/%2e%2e/v1/info", "/page/..%2f..%2fdeps.py", "/page/"])
async def test_the_page_has_its_own_files_and_no_others(teacher: Teacher, path: str) -> None:
    response = await teacher.client.get(path)
    assert (response.status_code, "error" in response.json()) == (404, True)


async def test_a_path_with_a_slash_too_many_is_not_redirected(teacher: Teacher) -> None:
    """The target would be made from the Host header."""
    response = await teacher.client.post("/v1/score/", headers={"host": "evil.example"})
    assert response.status_code == 404
    assert "location" not in response.headers
