"""What clients of other trainers are answered: the log-probs of /v1/score, in their own shapes.

Run: pytest tests/teacher/http/test_clients.py
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest

from teacher_server.http.clients import asking
from teacher_server.http.json_route import JsonRoute
from teacher_wire.errors import CapacityError, EngineError
from tests.teacher.http.client_requests import (
    miles_body,
    miles_parsed,
    prime_rl_body,
    prime_rl_parsed,
    scored,
    slime_body,
    slime_parsed,
    trl_body,
    trl_parsed,
)
from tests.teacher.http.http_teacher import INFO, PROMPT, RESPONSE, Teacher, V, no_constants

IDS = PROMPT + RESPONSE
P, R = len(PROMPT), len(RESPONSE)
K = 4


@pytest.fixture
def teacher() -> Teacher:
    return Teacher()


async def by_score(
    teacher: Teacher, ids: list[int], temperature: float = 1.0, first: int = 1, k: int = K
) -> Any:
    """What /v1/score says of ids[first:]."""
    body = {"prompt_ids": ids[:first], "response_ids": ids[first:], "k": k}
    reply = await teacher.post("/v1/score", body | {"temperature": temperature})
    return scored(reply.json())


async def answered(teacher: Teacher, path: str, body: dict[str, Any]) -> Any:
    reply = await teacher.post(path, body)
    assert reply.status_code == 200, reply.text
    return json.loads(reply.text, parse_constant=no_constants)


def refusal(reply: Any, status: int, kind: str = "BadRequestError") -> str:
    """The message of a refusal, which must have vLLM's shape."""
    content = reply.json()
    assert set(content) == {"error"}
    error = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (reply.status_code, error["code"], error["type"]) == (status, status, kind)
    return error["message"]


async def test_health_is_empty_and_503_until_ready(teacher: Teacher) -> None:
    for path in ("/health", "/health/", "/ping"):
        teacher.is_ready = True
        reply = await teacher.client.get(path)
        assert (reply.status_code, reply.content) == (200, b"")
        teacher.is_ready = False
        refusal(await teacher.client.get(path), 503, "ServiceUnavailableError")


async def test_the_model_is_listed_by_the_name_to_ask_for(teacher: Teacher) -> None:
    (card,) = (await teacher.client.get("/v1/models")).json()["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == ("fake", "fake", INFO.max_context)
    named = Teacher(served_name="teacher-7b")
    (card,) = (await named.client.get("/v1/models")).json()["data"]
    assert (card["id"], card["root"]) == ("teacher-7b", "fake")
    for name in ("teacher-7b", "fake", None):
        await answered(named, "/v1/completions", trl_body(IDS, K) | {"model": name})
    unknown = await named.post("/v1/completions", trl_body(IDS, K) | {"model": "x"})
    assert "The model `x` does not exist." in refusal(unknown, 404, "NotFoundError")
    assert set((await teacher.client.get("/version")).json()) == {"version"}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("is_batch", [True, False])
async def test_trl_reads_the_log_probs_of_score(
    teacher: Teacher, temperature: float, is_batch: bool
) -> None:
    texts = [IDS, IDS[:5], [3]] if is_batch else [IDS]
    body = trl_body(texts if is_batch else IDS, K, temperature)
    reply = await answered(teacher, "/v1/completions", body)
    assert reply["temperature"] == (temperature or 1.0)
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(texts)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, texts))
    for text, choice in zip(texts, reply["choices"], strict=True):
        assert len(choice["prompt_logprobs"]) == len(text)
        assert choice["prompt_logprobs"][0] is None
        if len(text) <= P:
            continue
        ids, logprobs, own = trl_parsed(choice, text, P)
        expected = await by_score(teacher, text, temperature or 1.0, P)
        np.testing.assert_array_equal([row[:K] for row in ids], expected[0])
        np.testing.assert_array_equal([row[:K] for row in logprobs], expected[1])
        np.testing.assert_array_equal(own, expected[2])


async def test_the_token_itself_comes_first_and_the_others_by_rank(teacher: Teacher) -> None:
    """As vLLM has it; prime-rl, verl and ms-swift take the first entry for the token's own."""
    reply = await answered(teacher, "/v1/completions", trl_body(IDS, K))
    ids, _, _ = await by_score(teacher, IDS)
    everything = (await by_score(teacher, IDS, k=V))[0]
    seen = set()
    for token, top, order, entry in zip(
        IDS[1:],
        ids.tolist(),
        everything.tolist(),
        reply["choices"][0]["prompt_logprobs"][1:],
        strict=True,
    ):
        assert list(map(int, entry)) == [token, *(i for i in top if i != token)]
        assert [e["rank"] for e in entry.values()] == [order.index(int(i)) + 1 for i in entry]
        assert all(isinstance(e["decoded_token"], str) for e in entry.values())
        seen.add(len(entry))
    assert seen == {K, K + 1}


@pytest.mark.parametrize(("asked", "width"), [(0, 0), (-1, V), (V, V)])
async def test_as_many_entries_as_asked_for(teacher: Teacher, asked: int, width: int) -> None:
    (choice,) = (await answered(teacher, "/v1/completions", trl_body(IDS, asked)))["choices"]
    assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {max(width, 1)}
    assert all(set(e) == set(map(str, range(V))) for e in choice["prompt_logprobs"][1:] if width)


async def test_minus_infinity_is_vllms_number(teacher: Teacher) -> None:
    inner = teacher.texts.score

    async def with_infinity(*args: Any, **kwargs: Any) -> Any:
        scores = await inner(*args, **kwargs)
        scores.rows.token_logprobs[1] = -np.inf
        return scores

    teacher.texts.score = with_infinity  # type: ignore[method-assign]
    reply = await answered(teacher, "/v1/completions", trl_body(IDS, 0))
    assert reply["choices"][0]["prompt_logprobs"][2][str(IDS[2])]["logprob"] == -9999.0


async def test_text_echo_and_ids_come_back_in_openais_form(teacher: Teacher) -> None:
    body = {"prompt": ["01+2", "77"], "echo": True, "logprobs": 2, "max_tokens": 0}
    reply = await answered(teacher, "/v1/completions", body | {"return_token_ids": True})
    first, second = reply["choices"]
    assert (first["text"], second["text"]) == ("01+2", "77")
    assert first["prompt_token_ids"] == [0, 1, 10, 2]
    assert (first["token_ids"], first["prompt_logprobs"]) == ([], None)
    told = first["logprobs"]
    assert (told["tokens"], told["text_offset"]) == (["0", "1", "+", "2"], [0, 1, 2, 3])
    expected = await by_score(teacher, [0, 1, 10, 2])
    assert told["token_logprobs"] == [None, *expected[2].tolist()]
    assert [len(entry) for entry in told["top_logprobs"][1:]] in ([2, 3, 3], [3, 3, 3], [3, 2, 3])
    named = await answered(
        teacher, "/v1/completions", body | {"return_tokens_as_token_ids": True, "prompt": IDS}
    )
    assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{i}" for i in IDS]
    ids = await answered(teacher, "/tokenize", {"prompt": "01+2", "return_token_strs": True})
    assert (ids["tokens"], ids["token_strs"], ids["count"]) == ([0, 1, 10, 2], list("01+2"), 4)


async def test_prime_rl_reads_the_log_probs_of_score(teacher: Teacher) -> None:
    reply = await answered(teacher, "/inference/v1/generate", prime_rl_body(IDS))
    own = prime_rl_parsed(reply)
    assert own[0] == 0.0
    np.testing.assert_array_equal(own[1:], (await by_score(teacher, IDS))[2])
    assert reply["choices"][0]["token_ids"] == []


@pytest.mark.parametrize("follows", [False, True])
async def test_a_request_whose_own_server_scores_at_1_is_scored_at_1_unless_set(
    follows: bool,
) -> None:
    teacher = Teacher(follow_temperature=follows)
    expected = (await by_score(teacher, IDS, 0.5 if follows else 1.0))[2]
    body = prime_rl_body(IDS)
    body["sampling_params"]["temperature"] = 0.5
    reply = await answered(teacher, "/inference/v1/generate", body)
    assert reply["temperature"] == (0.5 if follows else 1.0)
    np.testing.assert_array_equal(prime_rl_parsed(reply)[1:], expected)
    told = await answered(teacher, "/generate", slime_body(IDS, 0.5))
    assert told["meta_info"]["temperature"] == (0.5 if follows else 1.0)
    np.testing.assert_array_equal(slime_parsed(told, len(IDS) - 1), expected)


@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_slime_reads_the_log_probs_of_score(teacher: Teacher, method: str) -> None:
    reply = await teacher.client.request(method, "/generate", json=slime_body(IDS))
    own = slime_parsed(reply.json(), R)
    np.testing.assert_array_equal(own, (await by_score(teacher, IDS, first=P))[2])
    meta = reply.json()["meta_info"]
    assert meta["input_token_logprobs"][0] == [None, IDS[0], None]
    assert meta["temperature"] == 1.0
    assert "input_top_logprobs" not in meta


async def test_another_method_is_told_those_there_are(teacher: Teacher) -> None:
    """Was POST alone: each has a route."""
    reply = await teacher.client.get("/generate")
    refusal(reply, 405)
    assert reply.headers["allow"] == "POST, PUT"


async def test_miles_reads_top_k_and_its_own_ids_of_each_position(teacher: Teacher) -> None:
    positions = [[] for _ in PROMPT] + [[i % V, 3, (i * 5) % V][: i % 3 + 1] for i in range(R)]
    flat = [7, 2, 11]
    top_ids, top_logprobs, _ = await by_score(teacher, IDS, first=P)
    everything = await by_score(teacher, IDS, first=P, k=V)
    all_logprobs = [
        dict(zip(ids, values, strict=True))
        for ids, values in zip(everything[0].tolist(), everything[1].tolist(), strict=True)
    ]
    reply = await answered(
        teacher, "/generate", miles_body(IDS, K, token_ids_logprob_positions=positions)
    )
    told = miles_parsed(reply, "input_top_logprobs", R)
    assert [list(row) for row in told] == top_ids.tolist()
    assert [list(row.values()) for row in told] == top_logprobs.tolist()
    named = miles_parsed(reply, "input_token_ids_logprobs", R)
    for row, ids, known in zip(named, positions[P:], all_logprobs, strict=True):
        assert row == {i: known[i] for i in ids}
    assert reply["meta_info"]["input_token_ids_logprobs"][:P] == [None, [], []]
    reply = await answered(teacher, "/generate", miles_body(IDS, 0, token_ids_logprob=flat))
    for row, known in zip(
        miles_parsed(reply, "input_token_ids_logprobs", R), all_logprobs, strict=True
    ):
        assert row == {i: known[i] for i in flat}


async def test_a_batch_of_sglangs_is_answered_text_by_text(teacher: Teacher) -> None:
    body = slime_body(IDS) | {
        "input_ids": [IDS, IDS[:4]],
        "top_logprobs_num": [2, 0],
        "token_ids_logprob": [None, [1]],
        "rid": ["a", "b"],
        "return_text_in_logprobs": True,
    }
    first, second = await answered(teacher, "/generate", body)
    alone = await answered(
        teacher,
        "/generate",
        slime_body(IDS) | {"top_logprobs_num": 2, "return_text_in_logprobs": True},
    )
    assert first["meta_info"]["input_top_logprobs"] == alone["meta_info"]["input_top_logprobs"]
    assert "input_top_logprobs" not in second["meta_info"]
    assert [len(row) for row in second["meta_info"]["input_token_ids_logprobs"][1:]] == [1] * 3
    assert [first["meta_info"]["id"], second["meta_info"]["id"]] == ["a", "b"]
    assert second["meta_info"]["input_token_logprobs"][0] == [None, IDS[0], "0"]


@pytest.mark.parametrize(("start", "told"), [(None, 0), (-1, 0), (0, 9), (3, 6), (8, 1), (9, 0)])
async def test_sglangs_start_is_the_first_that_is_told_of_and_has_no_number(
    teacher: Teacher, start: int | None, told: int
) -> None:
    body = slime_body(IDS) | {"logprob_start_len": start, "token_ids_logprob": [1, 2]}
    meta = (await answered(teacher, "/generate", body))["meta_info"]
    entries = meta["input_token_logprobs"]
    assert [entry[1] for entry in entries] == IDS[len(IDS) - told :]
    assert [entry[0] is None for entry in entries] == [True, *[False] * (told - 1)][:told]
    assert len(meta["input_token_ids_logprobs"]) == told
    expected = (await by_score(teacher, IDS))[2]
    if told > 1:
        np.testing.assert_array_equal([e[0] for e in entries[1:]], expected[1 - told :])


@pytest.mark.parametrize("prompt_length", [0, 1, P, len(IDS)])
async def test_trl_up_to_1_10_reads_packed_arrays(teacher: Teacher, prompt_length: int) -> None:
    body = {
        "sequences": [IDS, IDS[:5]],
        "prompt_lengths": [prompt_length, min(prompt_length, 5)],
        "top_logprobs": K,
        "temperature": 0.7,
        "response_format": "binary",
    }
    reply = await answered(teacher, "/get_sequence_logprobs/", body)
    lengths = [len(IDS) - prompt_length, 5 - min(prompt_length, 5)]
    assert reply["completion_lengths"] == lengths
    assert reply["shape"] == [2, max(lengths), K]

    def array(name: str, dtype: str, width: int) -> np.ndarray:
        return np.frombuffer(base64.b64decode(reply[name]), dtype).reshape(2, max(lengths), width)

    ids, logprobs, own = (
        await by_score(teacher, IDS, 0.7, max(prompt_length, 1))
        if (prompt_length < len(IDS))
        else (np.zeros((0, K)), np.zeros((0, K)), np.zeros(0))
    )
    first = int(prompt_length == 0)
    np.testing.assert_array_equal(array("logprobs_b64", "<f4", K)[0, first:], logprobs)
    np.testing.assert_array_equal(array("token_ids_b64", "<i4", K)[0, first:], ids)
    np.testing.assert_array_equal(array("actual_logprobs_b64", "<f4", 1)[0, first:, 0], own)
    actual = array("actual_token_ids_b64", "<i4", 1)
    assert actual[0, first:, 0].tolist() == IDS[max(prompt_length, 1) :]
    lists = await answered(teacher, "/get_sequence_logprobs/", body | {"response_format": "json"})
    assert [len(rows) for rows in lists["logprobs"]] == lengths
    for row_ids, row, top, value, token in zip(
        lists["logprob_token_ids"][0][first:],
        lists["logprobs"][0][first:],
        ids.tolist(),
        own.tolist(),
        IDS[max(prompt_length, 1) :],
        strict=True,
    ):
        assert row_ids == (top if token in top else [*top, token])
        assert row[row_ids.index(token)] == value


async def test_a_prompt_that_grows_costs_its_new_rows_and_the_answer_says_so() -> None:
    teacher = Teacher()
    ids = np.random.default_rng(0).integers(0, V, 256).tolist()
    for length in range(64, 257, 64):
        before = teacher.engine.num_rows
        reply = await answered(teacher, "/v1/completions", trl_body([ids[:length]], K))
        kept = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert kept == (length - 65 if length > 64 else 0)
        assert teacher.engine.num_rows - before == length - 1 - kept
        whole = await by_score(Teacher(), ids[:length])
        own = trl_parsed(reply["choices"][0], ids[:length], 1)[2]
        np.testing.assert_array_equal(own, whole[2])
    text = teacher.metrics.render().decode()
    assert 'teacher_text_rows_total{source="kept"} 381.0' in text
    assert 'teacher_text_rows_total{source="made"} 255.0' in text


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "stream": ("/v1/completions", trl_body(IDS, K) | {"stream": True}, "stream is True: "),
    "n": ("/v1/completions", trl_body(IDS, K) | {"n": 4}, "n is 4: this teacher scores"),
    "tokens": ("/v1/completions", trl_body(IDS, K) | {"max_tokens": 2}, "max_tokens is 2: "),
    "nothing": ("/v1/completions", {"prompt": IDS}, "prompt_logprobs is missing"),
    "no echo": ("/v1/completions", {"prompt": IDS, "logprobs": 2}, "logprobs is 2: without echo"),
    "-2": ("/v1/completions", trl_body(IDS, -2), "greater than or equal to -1, got -2"),
    "a string": ("/v1/completions", trl_body(IDS, K) | {"prompt_logprobs": "3"}, "valid integer"),
    "too wide": (
        "/v1/completions",
        trl_body(IDS, V + 1),
        f"Requested prompt logprobs of {V + 1}, which is greater than max allowed: {V}",
    ),
    "an id": ("/v1/completions", trl_body([IDS, [V]], K), f"prompt[1][0] is {V}, must be in 0.."),
    "too long": ("/v1/completions", trl_body([1] * 4097, K), "maximum context length is 4096"),
    "empty": ("/v1/completions", trl_body([], K), "at least 1 item"),
    "cold": ("/v1/completions", trl_body(IDS, K, -1.0), "greater than or equal to 0, got -1.0"),
    "nearly cold": ("/v1/completions", trl_body(IDS, K, 1e-5), "temperature is 1e-05"),
    "prime-rl": (
        "/inference/v1/generate",
        prime_rl_body(IDS) | {"sampling_params": {"prompt_logprobs": 1, "n": 2}},
        "sampling_params.n is 2: ",
    ),
    "unasked": (
        "/inference/v1/generate",
        prime_rl_body(IDS) | {"sampling_params": {}},
        "sampling_params.prompt_logprobs is missing",
    ),
    "sglang": ("/generate", slime_body(IDS) | {"return_logprob": False}, "return_logprob is false"),
    "image": ("/generate", slime_body(IDS) | {"image_data": ["x"]}, "image_data is a list: "),
    "start": ("/generate", slime_body(IDS) | {"logprob_start_len": 10}, "must be at most 9"),
    "named": ("/generate", miles_body(IDS, 0, token_ids_logprob=[V]), "token_ids_logprob[0] is"),
    "many": (
        "/generate",
        miles_body(IDS, 0, token_ids_logprob=[1] * (V + 1)),
        "token_ids_logprob_positions",
    ),
    "positions": (
        "/generate",
        miles_body(IDS, 0, token_ids_logprob_positions=[[1]]),
        "has 1 lists, must have 9",
    ),
    "an id of a position": (
        "/generate",
        miles_body(IDS, 0, token_ids_logprob_positions=[[], [V], *[[]] * 7]),
        f"token_ids_logprob_positions[1, 0] is {V}",
    ),
    "both": (
        "/generate",
        miles_body(IDS, 0, token_ids_logprob=[1], token_ids_logprob_positions=[[]] * 9),
        "are both given: send one",
    ),
    "neither": ("/generate", {"return_logprob": True}, "exactly one of input_ids and text"),
    "lengths": (
        "/get_sequence_logprobs/",
        {"sequences": [IDS], "prompt_lengths": [10], "top_logprobs": K},
        "prompt_lengths[0] is 10, must be at most 9",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_not_served_is_refused_by_name(teacher: Teacher, case: str) -> None:
    path, body, text = REFUSED[case]
    assert text in refusal(await teacher.post(path, body), 400)
    assert teacher.engine.num_queries == 0


@pytest.mark.parametrize("prompt", [[], "", [[]], [""], [-1], None, {}, [[1], "a"]])
async def test_a_prompt_that_is_none_is_told_without_the_inside_of_python(
    teacher: Teacher, prompt: Any
) -> None:
    told = refusal(
        await teacher.post("/v1/completions", trl_body(IDS, K) | {"prompt": prompt}), 400
    )
    assert "prompt" in told
    assert "0x" not in told
    assert "function" not in told


def test_no_body_is_read_on_the_loop_that_carries_the_streams(teacher: Teacher) -> None:
    routes = [route for route in teacher.app.routes if getattr(route, "body_field", None)]
    assert len(routes) >= 9
    assert [route.path for route in routes if not isinstance(route, JsonRoute)] == []


async def test_a_body_without_a_content_type_is_told_which(teacher: Teacher) -> None:
    for path in ("/v1/completions", "/inference/v1/generate", "/generate", "/tokenize"):
        told = refusal(await teacher.client.post(path, content=b"{}"), 400)
        assert told.startswith("the header content-type is missing, must be application/json")


async def test_a_body_too_large_and_one_that_is_no_utf8_have_the_shape_too() -> None:
    teacher = Teacher(max_body_bytes=100)
    large = await teacher.client.post("/v1/completions", content=b" " * 101)
    assert "the limit" in refusal(large, 413)
    headers = {"content-type": "application/json"}
    broken = await teacher.client.post("/generate", content=b'{"text": "\xff"}', headers=headers)
    refusal(broken, 400)


async def test_an_answer_that_would_be_too_large_is_refused_before_anything_is_scored(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "MAX_ENTRIES", len(IDS) * (K + 1))
    refused = await teacher.post("/v1/completions", trl_body([IDS, IDS], K))
    assert "send fewer texts a call" in refusal(refused, 400)
    assert teacher.engine.num_queries == 0


async def test_a_text_waits_for_a_place_as_these_clients_do_not_come_back(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, full = teacher.texts.score, [True, True]

    async def crowded(*args: Any, **kwargs: Any) -> Any:
        if full and full.pop():
            raise CapacityError("full", retry_after_ms=10)
        return await inner(*args, **kwargs)

    teacher.texts.score = crowded  # type: ignore[method-assign]
    await answered(teacher, "/v1/completions", trl_body([IDS] * 3, K))
    full.append(True)
    monkeypatch.setattr(asking, "PATIENCE_S", 0.0)
    reply = await teacher.post("/v1/completions", trl_body([IDS], K))
    assert refusal(reply, 429, "RateLimitError") == "full"
    assert reply.headers["retry-after"] == "1"


async def test_the_first_text_that_fails_gives_up_the_others(teacher: Teacher) -> None:
    begun, ended = [], []

    async def some(token_ids: Any, *_: Any, **__: Any) -> Any:
        begun.append(len(token_ids))
        if len(token_ids) == 2:
            raise EngineError("/secret")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(len(token_ids))

    teacher.texts.score = some  # type: ignore[method-assign]
    reply = await teacher.post("/v1/completions", trl_body([IDS, [1, 2]], K))
    assert "secret" not in refusal(reply, 500, "InternalServerError")
    assert (begun, ended) == ([len(IDS), 2], [len(IDS)])


async def test_a_text_needs_a_tokenizer_and_ids_do_not() -> None:
    teacher = Teacher(has_tokenizer=False)
    for path, body in (
        ("/v1/completions", {"prompt": "0", "prompt_logprobs": 1}),
        ("/generate", {"text": "0", "return_logprob": True}),
        ("/tokenize", {"prompt": "0"}),
    ):
        assert "has no tokenizer: send token ids" in refusal(await teacher.post(path, body), 400)
    reply = await answered(teacher, "/v1/completions", trl_body(IDS, K))
    entries = reply["choices"][0]["prompt_logprobs"][1]
    assert {entry["decoded_token"] for entry in entries.values()} == {None}
