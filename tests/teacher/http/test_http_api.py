"""What the HTTP side answers. Run: pytest tests/teacher/http/test_http_api.py"""

import asyncio
import base64
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from teacher_server.engine.fake_engine import full_logprobs, prefix_seeds
from teacher_server.http import app, bodies
from teacher_server.http.clients.paths import HEALTH_PATHS, SHAPED_PATHS
from teacher_server.http.routes import v1
from teacher_wire.errors import ERROR_CODES, NonFiniteError
from tests.teacher.http.http_teacher import PROMPT, RESPONSE, Teacher, V, error_of, no_constants

FOLDER = Path(app.__file__).parent


@pytest.fixture
def teacher() -> Teacher:
    return Teacher()


async def test_health_says_alive_even_when_not_ready(teacher: Teacher) -> None:
    teacher.is_ready = False
    assert (await teacher.client.get("/healthz")).status_code == 200
    response = await teacher.client.get("/readyz")
    assert response.status_code == 503
    assert error_of(response)["type"] == "NotReadyError"
    assert response.headers["retry-after"] == "1"
    teacher.is_ready = True
    assert (await teacher.client.get("/readyz")).json() == {"status": "ready"}


async def test_info_is_the_record_and_says_whether_texts_work(teacher: Teacher) -> None:
    content = (await teacher.client.get("/v1/info")).json()
    assert content["vocab_size"] == V
    assert content["special_token_ids"] == [V - 2, V - 1]
    assert content["has_tokenizer"] is True


async def test_score_answers_the_model_numbers(teacher: Teacher) -> None:
    body = {"prompt_ids": PROMPT, "response_ids": RESPONSE, "k": 4, "want_rank": True}
    content = (await teacher.post("/v1/score", body)).json()
    rows = content["rows"]
    seeds = prefix_seeds(np.array([*PROMPT, *RESPONSE], np.int32))[len(PROMPT) :]
    expected = full_logprobs(seeds, V, 1.0)[np.arange(len(RESPONSE)), RESPONSE]
    np.testing.assert_array_equal(rows["token_logprobs"], expected.astype(np.float32))
    assert np.array(rows["topk_ids"]).shape == (len(RESPONSE), 4)
    assert rows["entropies"] is None
    assert content["drift"] is None
    assert content["verdict"] == "continue"
    assert set(content["timing"]) == {"queue_us", "engine_us", "computed_tokens"}
    assert content["timing"]["computed_tokens"] == len(RESPONSE)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("f32", "<f4"), ("f16", "<f2")])
async def test_packed_arrays_equal_the_json_numbers(
    teacher: Teacher, dtype: str, numpy_dtype: str
) -> None:
    body = {
        "prompt_ids": PROMPT,
        "response_ids": RESPONSE,
        "candidate_ids": [[1, 2, 3]] * len(RESPONSE),
        "k": 5,
        "want_entropy": True,
        "policy": {"metric": "overlap_ratio", "k": 3, "w_drop": 0.5},
    }
    plain = (await teacher.post("/v1/score", body)).json()["rows"]
    packed = await teacher.post("/v1/score", {**body, "encoding": "base64", "logprob_dtype": dtype})
    rows = packed.json()["rows"]
    assert rows["topk_logprobs"]["dtype"] == numpy_dtype
    for name in ("topk_ids", "topk_logprobs", "candidate_logprobs", "overlap_counts", "bad_events"):
        array = rows[name]
        values = np.frombuffer(base64.b64decode(array["data"]), array["dtype"])
        values = values.reshape(array["shape"])
        # Half precision is off by at most 2^-11 of the value.
        np.testing.assert_allclose(values, plain[name], rtol=2**-11 if dtype == "f16" else 0)
    assert rows["token_ranks"] is None


REFUSED_SCORES = {
    "unknown field": ({"temprature": 1.0}, "temprature"),
    "k too small": ({"k": 0}, "greater than or equal to 1, got 0"),
    "k beyond the vocabulary": ({"k": V + 1}, f"k is {V + 1}"),
    "k as text": ({"k": "4"}, "valid integer"),
    "k as a flag": ({"k": True}, "valid integer"),
    "empty response": ({"response_ids": []}, "at least 1 item"),
    "negative id": ({"response_ids": [-1]}, "greater than or equal to 0, got -1"),
    "id past int32": ({"response_ids": [2**31]}, "less than 2147483648"),
    "id past the vocabulary": (
        {"response_ids": [V]},
        f"token_ids[0] is {V}, must be in 0..{V - 1}",
    ),
    "fractional id": ({"prompt_ids": [1.5]}, "valid integer"),
    "a number for a list": ({"excluded_ids": 5}, "should be a valid array"),
    "ragged candidates": ({"candidate_ids": [[1], [1, 2]]}, "one length"),
    "candidates for another length": ({"candidate_ids": [[1]]}, "one row a token"),
    "empty candidates": ({"candidate_ids": [[]] * 6}, "one length >= 1"),
    "mask for another length": ({"event_mask": [True]}, "event_mask has shape"),
    "temperature zero": ({"temperature": 0.0}, "greater than or equal to 0.001"),
    "temperature that overflows": ({"temperature": 1e-91}, "got 1e-91"),
    "unknown metric": ({"policy": {"metric": "vibes"}}, "overlap_ratio"),
    "threshold above one": ({"policy": {"threshold": 1.5}}, "threshold is 1.5"),
    "a constant of another metric": (
        {"policy": {"metric": "teacher_top_p_accept", "threshold": 0.7}},
        "policy.teacher_top_p_accept.threshold",
    ),
    "policy k of another type": ({"policy": {"k": 4.5}}, "valid integer"),
    "policy k too large": ({"policy": {"k": 256}}, "drift k is 256"),
    "unknown policy field": ({"policy": {"gamma": 0.7}}, "gamma"),
    "overlap without candidates": ({"policy": {"k": 4}}, "0 ids a row"),
}


@pytest.mark.parametrize("case", REFUSED_SCORES)
async def test_a_score_request_that_cannot_succeed_is_refused_with_its_reason(
    teacher: Teacher, case: str
) -> None:
    change, reason = REFUSED_SCORES[case]
    body = {"prompt_ids": PROMPT, "response_ids": RESPONSE, "k": 4, **change}
    response = await teacher.post("/v1/score", body)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "InvalidRequestError")
    assert error["retryable"] is False
    assert reason in error["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"nul", b"\xff\xfe", b'{"k": 1e999}', b"[" * 100_000, b"9" * 9999]
)
@pytest.mark.parametrize("path", ["/v1/score", "/v1/analyze", "/v1/compare"])
async def test_a_body_that_is_no_request_is_refused(
    teacher: Teacher, path: str, content: bytes
) -> None:
    response = await teacher.client.post(
        path, content=content, headers={"content-type": "application/json"}
    )
    assert (response.status_code, error_of(response)["type"]) == (400, "InvalidRequestError")


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
async def test_non_finite_numbers_are_refused_on_the_way_in(teacher: Teacher, name: str) -> None:
    content = f'{{"prompt_ids": [1], "response_ids": [1], "temperature": {name}}}'
    response = await teacher.client.post(
        "/v1/score", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    json.loads(response.content, parse_constant=no_constants)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("path", "extra"),
    [("/v1/score", {}), ("/v1/score", {"encoding": "base64"}), ("/v1/analyze", {})],
)
async def test_non_finite_scores_never_leave(
    teacher: Teacher, path: str, extra: dict[str, Any], value: float
) -> None:
    teacher.sessions.poison = value
    response = await teacher.post(path, {"prompt_ids": PROMPT, "response_ids": RESPONSE, **extra})
    assert response.status_code == ERROR_CODES[NonFiniteError].http
    error = error_of(response)
    assert error["type"] == "NonFiniteError"
    assert "token_logprobs is not finite at response token 2" in error["message"]


async def test_replies_too_large_for_json_are_refused_before_the_engine(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v1, "MAX_JSON_ENTRIES", 11)
    body = {"prompt_ids": PROMPT, "response_ids": RESPONSE, "k": 2}
    refused = await teacher.post("/v1/score", body)
    assert refused.status_code == 400
    assert "12 entries" in error_of(refused)["message"]
    assert teacher.engine.num_queries == 0
    assert (await teacher.post("/v1/score", {**body, "encoding": "base64"})).status_code == 200


async def test_the_page_is_self_contained_and_its_policy_allows_it(teacher: Teacher) -> None:
    response = await teacher.client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    files = set(re.findall(r'(?:src|href)="(?!data:,)([^"]*)"', response.text))
    assert {"page/d3.js", "page/main.js", "page/base.css"} <= files
    for name in [path.name for path in (FOLDER / "page").iterdir()]:
        files |= {f"page/{name}"}
    for path in files:
        reply = await teacher.client.get(f"/{path}")
        assert reply.headers["content-security-policy"] == policy
        kept = await teacher.client.get(
            f"/{path}", headers={"if-none-match": reply.headers["etag"]}
        )
        assert (reply.status_code, kept.status_code, kept.content) == (200, 304, b"")
        if path != "page/d3.js":
            assert not re.findall(
                r"https?:|@import|url\(|innerHTML|outerHTML|insertAdjacent|eval\(|"
                r"new Function|\son\w+=\"|\sstyle=",
                reply.text,
            ), path


async def test_the_schema_names_every_field_of_a_score_request(teacher: Teacher) -> None:
    schema = (await teacher.client.get("/openapi.json")).json()
    assert {
        "/v1/score",
        "/v1/analyze",
        "/v1/compare",
        "/v1/info",
        "/docs",
        "/healthz",
        "/readyz",
    } <= set(schema["paths"])
    fields = schema["components"]["schemas"]["ScoreBody"]["properties"]
    assert {"prompt_ids", "response_ids", "candidate_ids", "policy", "encoding"} <= set(fields)


@pytest.mark.parametrize("encoding", ["json", "base64"])
@pytest.mark.parametrize("is_judged", [False, True])
async def test_replies_are_what_the_schema_says(
    teacher: Teacher, encoding: str, is_judged: bool
) -> None:
    body: dict[str, Any] = {"prompt_ids": PROMPT, "response_ids": RESPONSE, "k": 5}
    if is_judged:
        body["candidate_ids"] = [[1, 2, 3]] * len(RESPONSE)
        body["policy"] = {"k": 3, "w_drop": 0.5}
    full = {"want_entropy": is_judged, "want_rank": is_judged, "encoding": encoding}
    score = await teacher.post("/v1/score", body | full)
    bodies.ScoreReply.model_validate_json(score.text, strict=True)
    info = await teacher.client.get("/v1/info")
    TypeAdapter(bodies.InfoReply).validate_json(info.text, strict=True)
    assert set(info.json()) == set(bodies.InfoReply.__dataclass_fields__)
    wrong = await teacher.post("/v1/score", body | {"k": 0})
    bodies.ErrorReply.model_validate_json(wrong.text, strict=True)


@pytest.mark.parametrize("is_secured", [False, True])
def test_the_schema_says_where_a_token_is_needed(is_secured: bool) -> None:
    teacher = Teacher(authenticate=(lambda *_: "somebody") if is_secured else None)
    secured = {
        path
        for path, methods in teacher.app.openapi()["paths"].items()
        for operation in methods.values()
        if operation.get("security")
    }
    everywhere = {"/metrics", "/v1/info", "/v1/score", "/v1/analyze", "/v1/compare"}
    step = "/v1/runs/{run}/steps/{step}"
    everywhere |= {"/v1/runs", "/v1/runs/{run}", step, f"{step}/rollouts/{{index}}"}
    everywhere |= SHAPED_PATHS - set(HEALTH_PATHS)
    assert secured == (everywhere if is_secured else set())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FIELDS = ["prompt_ids", "response_ids", "prompt", "response", "k", "candidate_ids", "event_mask"]
FIELDS += ["policy", "temperature", "encoding", "want_rank", "logprob_dtype", "add_special_tokens"]
FIELDS += ["messages", "items", "chat_template_kwargs", "responses", "policies"]


@pytest.fixture(scope="module")
def shared_teacher() -> Teacher:
    return Teacher()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as one_loop:
        yield one_loop


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["/v1/score", "/v1/analyze", "/v1/compare"]),
    change=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, min_size=1, max_size=3),
)
def test_no_json_makes_the_server_fail(
    runner: asyncio.Runner, shared_teacher: Teacher, path: str, change: dict[str, Any]
) -> None:
    body = {"prompt_ids": PROMPT, "response_ids": RESPONSE, **change}
    headers = {"content-type": "application/json"}
    request = shared_teacher.client.post(path, content=json.dumps(body), headers=headers)
    response = runner.run(request)
    assert response.status_code in (200, 400)
    json.loads(response.content, parse_constant=no_constants)
    if response.status_code == 400:
        assert error_of(response)["type"] == "InvalidRequestError"
