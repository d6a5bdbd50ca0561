"""What /v1/analyze and /v1/compare answer and refuse.

Run: pytest tests/teacher/http/test_analysis_api.py
"""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from teacher_server.http import analysis_bodies as bodies
from teacher_server.http.rendering import ARROW, LINES
from teacher_server.http.routes import analysis as routes
from teacher_wire.errors import CapacityError, EngineError
from teacher_wire.report_columns import IN_TABLE
from tests.teacher.http.http_teacher import (
    PROMPT,
    RESPONSE,
    SPECIALS,
    Teacher,
    V,
    error_of,
    no_constants,
)

IDS = {"prompt_ids": PROMPT, "response_ids": RESPONSE}
CANDIDATES = [[1, 2, 3, 4]] * len(RESPONSE)
TOP_P = {"metric": "teacher_top_p_accept", "k": 3, "top_p": 0.6, "w_drop": 0.5}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """For tests that leave it as it was."""
    return Teacher()


async def analyzed(teacher: Teacher, **body: Any) -> dict[str, Any]:
    """The report of what must be answered."""
    response = await teacher.post("/v1/analyze", body)
    assert response.status_code == 200, response.text
    report: dict[str, Any] = json.loads(response.content, parse_constant=no_constants)
    return report


async def refused(teacher: Teacher, path: str = "/v1/analyze", **body: Any) -> str:
    """Why a request is refused; nothing may have reached the engine."""
    before = teacher.engine.num_queries
    response = await teacher.post(path, body)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "InvalidRequestError")
    assert teacher.engine.num_queries == before
    return str(error["message"])


async def test_the_columns_are_those_of_a_score(teacher: Teacher) -> None:
    body = {**IDS, "candidate_ids": CANDIDATES, "k": 4, "policy": {"k": 3, "w_drop": 0.5}}
    report = await analyzed(teacher, **body)
    flags = {"want_entropy": True, "want_rank": True}
    score = (await teacher.post("/v1/score", {**body, **flags})).json()
    names = {
        "teacher_logprobs": "token_logprobs",
        "teacher_topk_ids": "topk_ids",
        "teacher_topk_logprobs": "topk_logprobs",
        "teacher_logprobs_at_candidates": "candidate_logprobs",
        "entropies": "entropies",
        "ranks": "token_ranks",
        "bad_events": "bad_events",
    }
    for shown, name in names.items():
        expected = np.array(score["rows"][name])
        found = np.array(report[shown], np.float32 if expected.dtype.kind == "f" else None)
        np.testing.assert_array_equal(found, expected, shown)
    np.testing.assert_allclose(report["overlap"], np.array(score["rows"]["overlap_counts"]) / 3)
    assert report["candidate_ids"] == CANDIDATES
    assert (report["verdict"], report["keep_tokens"]) == (score["verdict"], score["keep_tokens"])
    assert report["num_bad_events"] == score["drift"]["num_bad_events"]
    assert (report["prompt_ids"], report["response_ids"]) == (PROMPT, RESPONSE)
    assert report["mean_logprob"] == pytest.approx(np.mean(report["teacher_logprobs"]))
    assert report["policy"]["k"] == 3
    shown_ids = {*PROMPT, *RESPONSE, 1, 2, 3, 4, *np.ravel(report["teacher_topk_ids"])}
    assert set(map(int, report["texts"])) == shown_ids
    assert report["texts"]["12"] == "="


async def test_text_messages_and_ids_of_one_prompt_give_one_report(teacher: Teacher) -> None:
    by_ids = await analyzed(teacher, **IDS, k=3, policy=TOP_P)
    by_text = await analyzed(teacher, prompt="01+", response="2=5;77", k=3, policy=TOP_P)
    by_ids.pop("timing")
    assert {name: by_text[name] for name in by_ids} == by_ids
    chat = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]
    by_chat = await analyzed(teacher, messages=chat, response="2=5;77")
    flat = await analyzed(teacher, prompt="0;1;=", response_ids=RESPONSE)
    for report in (by_chat, flat):
        report.pop("timing")
    assert by_chat == flat
    longer = {"messages": chat, "chat_template_kwargs": {"times": 3}, "response": "2"}
    assert (await analyzed(teacher, **longer))["prompt_ids"] == [0, 13, 1, 13, 12, 12, 12]


async def test_special_tokens_raise_no_bad_event(teacher: Teacher) -> None:
    policy = {"metric": "teacher_top_p_accept", "k": 1, "top_p": 0.01}
    report = await analyzed(
        teacher, prompt_ids=PROMPT, response_ids=[V - 1] * 5, k=1, policy=policy
    )
    assert report["num_bad_events"] == 0


@pytest.mark.parametrize(
    ("policy", "candidates", "metric", "k"),
    [
        ({}, None, "teacher_top_p_accept", 5),
        ({}, CANDIDATES, "overlap_ratio", 4),
        ({"w_drop": 0.5}, None, "teacher_top_p_accept", 5),
        ({"k": 2}, CANDIDATES, "overlap_ratio", 2),
        ({"threshold": 0.5}, CANDIDATES, "overlap_ratio", 4),
        ({"top_p": 0.5}, CANDIDATES, "teacher_top_p_accept", 5),
        ({"metric": "teacher_top_p_accept"}, None, "teacher_top_p_accept", 5),
        # More than is shown: it is scored all the same, up to what the teacher gives.
        ({"metric": "teacher_top_p_accept", "k": 9}, None, "teacher_top_p_accept", 9),
        ({"metric": "teacher_top_p_accept", "k": 200}, None, "teacher_top_p_accept", V),
    ],
)
async def test_a_policy_fits_the_sizes_of_its_request(
    teacher: Teacher, policy: dict[str, Any], candidates: Any, metric: str, k: int
) -> None:
    report = await analyzed(teacher, **IDS, k=5, policy=policy, candidate_ids=candidates)
    assert (report["policy"]["metric"], report["policy"]["k"]) == (metric, k)
    assert np.shape(report["teacher_topk_ids"]) == (len(RESPONSE), 5)


@pytest.mark.parametrize("k", [1, 2, 8, 16, V])
async def test_the_usual_policy_works_at_every_k(teacher: Teacher, k: int) -> None:
    for candidates in (None, CANDIDATES):
        report = await analyzed(teacher, **IDS, k=k, policy={}, candidate_ids=candidates)
        assert report["policy"]["k"] <= min(16, k)


async def test_packed_candidates_are_those_of_lists(teacher: Teacher) -> None:
    array = np.array(CANDIDATES, "<i4")
    packed = {
        "dtype": "<i4",
        "shape": list(array.shape),
        "data": base64.b64encode(array.tobytes()).decode(),
    }
    reports = [await analyzed(teacher, **IDS, candidate_ids=c) for c in (CANDIDATES, packed)]
    for report in reports:
        report.pop("timing")
    assert reports[0] == reports[1]
    for change in ({"dtype": "<i8"}, {"shape": [24]}, {"shape": [6, 5]}, {"data": "!"}):
        message = await refused(teacher, **IDS, candidate_ids=packed | change)
        assert "candidate_ids" in message


REFUSED = {
    "prompt twice": ({"prompt": "0"}, "exactly one of messages, prompt, prompt_ids"),
    "no response": ({"response_ids": None}, "exactly one of response, response_ids"),
    "empty text": ({"prompt_ids": None, "prompt": ""}, "prompt"),
    "k too small": ({"k": 0}, "body.k"),
    "k beyond the vocabulary": ({"k": V + 1}, f"k is {V + 1}, the limit is {V}"),
    "id past the vocabulary": ({"response_ids": [1, V]}, f"response_ids[1] is {V}, must be in 0.."),
    "prompt id past it": ({"prompt_ids": [V]}, f"prompt_ids[0] is {V}"),
    "negative id": ({"response_ids": [-1]}, "body.response_ids.0"),
    "candidate past it": ({"candidate_ids": [[V]] * 6}, f"candidate_ids[0, 0] is {V}"),
    "ragged candidates": ({"candidate_ids": [[1], [1, 2]]}, "candidate_ids has rows of [1, 2]"),
    "candidates for another length": ({"candidate_ids": [[1]]}, "one row a token"),
    "temperature": ({"temperature": 0.0}, "body.temperature"),
    "overlap without candidates": (
        {"policy": {"metric": "overlap_ratio"}},
        "policy.metric is overlap_ratio, which compares candidate_ids: send them",
    ),
    "overlap wider than candidates": (
        {"policy": {"metric": "overlap_ratio", "k": 5}, "candidate_ids": CANDIDATES},
        "policy.k is 5, but it compares candidate_ids, which has 4 ids a row",
    ),
    "threshold": ({"policy": {"threshold": 1.5}, "candidate_ids": CANDIDATES}, "threshold is 1.5"),
    "unknown metric": ({"policy": {"metric": "vibes"}}, "policy"),
    "metric of another type": ({"policy": {"metric": 3}}, "policy"),
    "unknown constant": ({"policy": {"gamma": 1}}, "gamma"),
    "unknown field": ({"temprature": 1.0}, "temprature"),
    "items beside others": ({"items": [IDS]}, "items must be given alone"),
    "no items": ({"items": []}, "items"),
    "too long": ({"prompt_ids": [1] * 4095}, "4101 tokens, the limit is 4096"),
    "messages without a turn": ({"prompt_ids": None, "messages": []}, "messages"),
    "template's own refusal": (
        {"prompt_ids": None, "messages": [{"role": "tool", "content": "1"}]},
        "messages: the chat template says: no tools here",
    ),
    "a turn of another shape": (
        {"prompt_ids": None, "messages": [{"role": "user", "content": ["x"]}]},
        "body.messages.0.content",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_answered_is_refused_by_the_name_of_its_field(
    teacher: Teacher, case: str
) -> None:
    change, reason = REFUSED[case]
    assert reason in await refused(teacher, **{**IDS, **change})


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
@pytest.mark.parametrize("path", ["/v1/analyze", "/v1/score", "/v1/compare"])
async def test_another_content_type_is_told_which_header_to_send(
    teacher: Teacher, path: str, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = await teacher.client.post(path, content=json.dumps(IDS).encode(), headers=headers)
    assert response.status_code == 400
    assert "-H 'content-type: application/json'" in error_of(response)["message"]


async def test_broken_bytes_and_bodies_of_100_mb_leave_the_server_as_it_was(
    teacher: Teacher,
) -> None:
    before = await analyzed(teacher, **IDS)
    headers = {"content-type": "application/json"}
    for content, status, what in (
        (b'{"prompt": "\xff\xfe", "response": "1"}', 400, "Invalid JSON"),
        (b'{"prompt": "\\ud800", "response": "1"}', 400, "Invalid JSON"),
        (b" " * 100_000_000, 413, "the body has 100000000 bytes, the limit is 8388608"),
    ):
        response = await teacher.client.post("/v1/analyze", content=content, headers=headers)
        assert response.status_code == status
        assert what in error_of(response)["message"]
    after = await analyzed(teacher, **IDS)
    assert set(before.pop("timing")) == set(after.pop("timing"))
    assert after == before


async def test_one_wrong_id_of_a_million_is_refused_at_once(teacher: Teacher) -> None:
    """The first is told: a list of all would take as long as the list."""
    message = await refused(teacher, prompt_ids=[0], response_ids=[-1] * 300_000)
    assert message.count("response_ids") == 1


async def test_text_that_is_not_in_the_vocabulary_is_told(teacher: Teacher) -> None:
    report = await analyzed(teacher, prompt="0x", response="1<b>2")
    found = {w["field"]: (w["reason"], w["positions"]) for w in report["warnings"]}
    assert found == {"prompt": ("unknown_text", [1]), "response": ("unknown_text", [1])}
    assert SPECIALS[0] in report["warnings"][0]["message"]
    assert (await analyzed(teacher, prompt="0", response="1"))["warnings"] == []


async def test_a_batch_answers_each_item_by_itself() -> None:
    teacher = Teacher()
    items = [
        {**IDS, "k": 2},
        {"prompt_ids": PROMPT, "response_ids": [V]},
        {"prompt": "0", "response": "1", "policy": {}},
        {**IDS, "policy": {"metric": "overlap_ratio"}},
    ]
    response = await teacher.post("/v1/analyze", {"items": items})
    assert response.status_code == 200
    first, second, third, fourth = response.json()["items"]
    alone = await analyzed(teacher, **items[0])
    assert {n: first[n] for n in first if n != "timing"} == {
        n: alone[n] for n in alone if n != "timing"
    }
    assert second["error"]["type"] == "InvalidRequestError"
    assert f"response_ids[0] is {V}" in second["error"]["message"]
    assert third["response_ids"] == [1]
    assert "candidate_ids" in fourth["error"]["message"]
    assert (
        'teacher_errors_total{type="InvalidRequestError"} 2.0' in teacher.metrics.render().decode()
    )


async def test_a_failure_of_the_engine_in_a_batch_tells_nothing_of_its_insides() -> None:
    teacher = Teacher()
    teacher.sessions.failure = EngineError("/secret/path")
    response = await teacher.post("/v1/analyze", {"items": [IDS]})
    (item,) = response.json()["items"]
    assert item["error"]["type"] == "EngineError"
    assert "secret" not in response.text
    teacher.sessions.failure = CapacityError("full", retry_after_ms=70)
    (item,) = (await teacher.post("/v1/analyze", {"items": [IDS]})).json()["items"]
    assert (item["error"]["retryable"], item["error"]["retry_after_ms"]) == (True, 70)


def joined(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A report out of its lines."""
    first, *pieces, last = lines
    report = {**first, **last}
    report["texts"] = {k: v for line in lines for k, v in line.get("texts", {}).items()}
    for name in ("response_ids", *IN_TABLE):
        columns = [piece[name] for piece in pieces]
        report[name] = None if columns[0] is None else [x for column in columns for x in column]
    return report


async def lines_of(teacher: Teacher, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await teacher.client.post("/v1/analyze", json=body, headers={"accept": LINES})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == LINES
    return [json.loads(line) for line in response.text.splitlines()]


async def test_lines_are_the_report_piece_by_piece(teacher: Teacher) -> None:
    body = {**IDS, "candidate_ids": CANDIDATES, "k": 3, "policy": {"k": 2, "w_drop": 0.5}}
    lines = await lines_of(teacher, body)
    assert [line.get("offset") for line in lines] == [None, 0, 4, None]
    report = joined(lines)
    whole = await analyzed(teacher, **body)
    for name in set(whole) - {"timing"}:
        assert report[name] == whole[name], name


async def test_lines_of_a_batch_are_marked_and_a_failure_is_a_line(teacher: Teacher) -> None:
    lines = await lines_of(teacher, {"items": [IDS, {**IDS, "k": V + 1}, IDS]})
    assert [line["item"] for line in lines] == [0] * 4 + [1] * 2 + [2] * 4
    failed = [line for line in lines if "error" in line]
    assert [line["item"] for line in failed] == [1]
    assert f"k is {V + 1}" in failed[0]["error"]["message"]


async def test_what_is_refused_has_its_status_in_every_form(teacher: Teacher) -> None:
    for form in (LINES, ARROW):
        response = await teacher.client.post(
            "/v1/analyze", json={**IDS, "k": V + 1}, headers={"accept": form}
        )
        assert response.status_code == 400
        assert f"k is {V + 1}" in error_of(response)["message"]


def table_of(response: httpx.Response) -> tuple[pa.Table, dict[str, Any]]:
    assert response.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(response.content).read_all()
    return table, json.loads(table.schema.metadata[b"driftline"])


async def test_an_arrow_stream_is_a_table_of_one_row_a_token(teacher: Teacher) -> None:
    body = {**IDS, "candidate_ids": CANDIDATES, "k": 3, "policy": {}}
    headers = {"accept": ARROW}
    table, told = table_of(await teacher.client.post("/v1/analyze", json=body, headers=headers))
    report = await analyzed(teacher, **body)
    for name, singular in IN_TABLE.items():
        found = table.column(singular).to_pylist()
        is_float = np.array(report[name]).dtype.kind == "f"
        np.testing.assert_array_equal(
            np.array(found, np.float32 if is_float else None),
            np.array(report[name], np.float32 if is_float else None),
            name,
        )
    assert table.column("text").to_pylist() == ["2", "=", "5", ";", "7", "7"]
    assert table.column("position").to_pylist() == list(range(6))
    (rollout,) = told["rollouts"]
    assert rollout["verdict"] == report["verdict"]
    assert rollout["prompt_ids"] == PROMPT

    both = {"items": [IDS, {**IDS, "k": V + 1}, body]}
    table, told = table_of(await teacher.client.post("/v1/analyze", json=both, headers=headers))
    assert table.column("rollout").to_pylist() == [0] * 6 + [2] * 6
    assert [r["rollout"] for r in told["rollouts"]] == [0, 2]
    assert f"k is {V + 1}" in told["errors"]["1"]["message"]
    only = {"items": [{**IDS, "k": V + 1}]}
    table, told = table_of(await teacher.client.post("/v1/analyze", json=only, headers=headers))
    assert (len(table), list(told["errors"])) == (0, ["0"])


async def test_several_policies_are_judged_on_one_scoring(teacher: Teacher) -> None:
    policies = [{}, TOP_P, {"metric": "overlap_ratio", "k": 4, "threshold": 0.1}]
    before = teacher.engine.num_queries
    response = await teacher.post(
        "/v1/compare",
        {
            "prompt_ids": PROMPT,
            "responses": [{"response_ids": RESPONSE, "candidate_ids": CANDIDATES}],
            "policies": policies,
            "k": 3,
        },
    )
    assert response.status_code == 200, response.text
    assert teacher.engine.num_queries - before == 2  # appends of four tokens
    bodies.CompareReply.model_validate_json(response.text, strict=True)
    (report,) = response.json()["responses"]
    for policy, judged in zip(policies, report["judgements"], strict=True):
        alone = await analyzed(teacher, **IDS, candidate_ids=CANDIDATES, k=3, policy=policy)
        assert judged == {name: alone[name] for name in judged}


async def test_several_responses_to_one_prompt_are_compared(teacher: Teacher) -> None:
    response = await teacher.post(
        "/v1/compare",
        {
            "prompt": "01+",
            "responses": [
                {"name": "first", "response": "2=5;77"},
                {"name": "second", "response": "2=57"},
                {"response_ids": [V]},
            ],
        },
    )
    bodies.CompareReply.model_validate_json(response.text, strict=True)
    answer = response.json()
    first, second, third = answer["responses"]
    assert (first["name"], second["name"], third["name"]) == ("first", "second", None)
    assert (first["common_prefix_tokens"], second["common_prefix_tokens"]) == (6, 3)
    assert f"response_ids[0] is {V}" in third["error"]["message"]
    assert first["judgements"] == []
    alone = await analyzed(teacher, prompt="01+", response="2=57")
    assert second["teacher_logprobs"] == alone["teacher_logprobs"]
    assert set(map(str, RESPONSE)) <= set(answer["texts"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"responses": []}, "body.responses"),
        ({"responses": [{}]}, "body.responses.0"),
        ({"prompt": "0"}, "exactly one of messages, prompt, prompt_ids"),
        ({"policies": [{}] * 17}, "body.policies"),
        ({"policies": [{"top_p": 2.0}, "x"]}, "body.policies.1"),
        ({"prompt_ids": None, "prompt": "x" * (2**20 + 1)}, "body.prompt"),
    ],
)
async def test_a_comparison_that_cannot_be_made_is_refused(
    teacher: Teacher, change: dict[str, Any], reason: str
) -> None:
    body = {"prompt_ids": PROMPT, "responses": [{"response_ids": RESPONSE}]}
    assert reason in await refused(teacher, "/v1/compare", **{**body, **change})


async def test_more_than_json_holds_is_refused_with_the_form_that_holds_it(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "MAX_JSON_ENTRIES", 35)
    assert "are 36 entries" in await refused(teacher, **IDS, k=2, candidate_ids=CANDIDATES)
    message = await refused(teacher, items=[{**IDS, "k": 3}] * 2)
    assert f"accept: {LINES}" in message
    assert len(await lines_of(teacher, {**IDS, "k": 8})) == 4


@pytest.mark.parametrize("judged", [False, True])
async def test_replies_are_what_the_schema_says(teacher: Teacher, judged: bool) -> None:
    body: dict[str, Any] = {**IDS, "k": 5}
    if judged:
        body |= {"candidate_ids": CANDIDATES, "policy": {}, "prompt_ids": None, "prompt": "0x"}
    alone = await teacher.post("/v1/analyze", body)
    bodies.AnalyzeReply.model_validate_json(alone.text, strict=True)
    assert list(alone.json()) == [*dict.fromkeys(alone.json())]
    several = await teacher.post("/v1/analyze", {"items": [body, {**IDS, "k": 4000}]})
    TypeAdapter(bodies.BatchReply).validate_json(several.text, strict=True)


async def test_analysis_is_background_work_and_a_score_is_not() -> None:
    teacher, told = Teacher(), []
    inner = teacher.sessions._scorer.score

    async def noted(*args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["background"])
        return await inner(*args, **kwargs)

    teacher.sessions._scorer.score = noted  # type: ignore[method-assign]
    await teacher.post("/v1/score", IDS)
    assert set(told) == {False}
    told.clear()
    await analyzed(teacher, **IDS)
    await lines_of(teacher, IDS)
    await teacher.post("/v1/compare", {"prompt_ids": PROMPT, "responses": [{"response": "1"}]})
    assert set(told) == {True}


class Links(HTMLParser):
    """What a page would load, and the anchors it has and names."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.named: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src" or (name == "href" and not (value or "").startswith(("#", "data:"))):
                self.loaded.append(f"{tag} {value}")
            if name == "href" and (value or "").startswith("#"):
                self.named.add((value or "")[1:])
            if name == "id":
                self.anchors.add(value or "")


async def test_the_documentation_needs_nothing_else_and_names_every_path(teacher: Teacher) -> None:
    response = await teacher.client.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'none'; style-src 'sha256-" in policy
    page = Links()
    page.feed(response.text)
    assert page.loaded == []
    assert page.named <= page.anchors
    assert not re.findall(r"<script|\sstyle=|\son\w+=|https?://", response.text)
    for path in (await teacher.client.get("/openapi.json")).json()["paths"]:
        assert path in response.text
    assert "candidate_ids (optional)" in response.text
    assert "(from 0, below 2147483648)" in response.text
    assert "With verdict &quot;truncate&quot;: response tokens to keep." in response.text
