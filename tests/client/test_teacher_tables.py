"""Teacher and AsyncTeacher against the playground's teacher, as a user starts it.

Run: pytest tests/client/test_teacher_tables.py
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from teacher_client import AsyncTeacher, RetryLimits, Teacher, TeacherHttp
from teacher_client.http_messages import to_json
from teacher_client.questions import Questions
from teacher_client.retry import Patience
from teacher_client.rollout_items import MAX_ENTRIES, Batches, item_of, rows_of
from teacher_wire.drift_metrics import OverlapRatio, TeacherTopPAccept
from teacher_wire.errors import CapacityError, InvalidRequestError, NotReadyError
from teacher_wire.records import DriftPolicy, ScoreOptions, TokenSpan
from teacher_wire.report_columns import IN_TABLE
from tests.faults.live_server import LiveServer, live_server
from tests.rounds import in_the_long_round
from tests.waiting import LIMIT_S

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "notebooks" / "analyze.ipynb"
PROMPT, RESPONSE = "37+4*3-8x12>", "01:37+4=41*3=23-8=15;02:15+4=19"
QUICK = RetryLimits(max_resends=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("teacher")
    with live_server(folder, program=("tests.client.playground_teacher",)) as running:
        yield running
        print(f"server's processor time {running.cpu_s():.1f} s")  # noqa: T201


@pytest.fixture
def teacher(server: LiveServer) -> Iterator[Teacher]:
    with Teacher(server.http_address) as made:
        yield made


def rollouts(count: int) -> list[dict[str, Any]]:
    """Of different lengths, with candidates, as ids: one token is one character."""
    made = []
    for index in range(count):
        ids = [3 + (7 * index + position) % 40 for position in range(10 + index)]
        candidates = [[i, (i + 1) % 64, (i + 2) % 64] for i in ids]
        made.append({"prompt": PROMPT, "response_ids": ids, "candidate_ids": candidates})
    return made


def test_twenty_rollouts_with_the_students_view_are_one_table(
    server: LiveServer, teacher: Teacher
) -> None:
    many = rollouts(20)
    frame = teacher.analyze(many, k=4, policy={"k": 3})
    assert frame.groupby("rollout").size().tolist() == [len(r["response_ids"]) for r in many]
    assert {*IN_TABLE.values()} < {*frame.columns}
    seventh = frame[frame["rollout"] == 7]
    assert seventh["token_id"].tolist() == many[7]["response_ids"]
    assert seventh["candidate_ids"].tolist() == many[7]["candidate_ids"]
    assert seventh["position"].tolist() == list(range(17))
    assert (frame["teacher_topk_texts"].str.len() == 4).all()
    with TeacherHttp(f"http://{server.http_address}") as http:
        prompt_ids = np.array(frame.attrs["rollouts"][7]["prompt_ids"], np.int32)
        span = TokenSpan(
            offset=0,
            token_ids=np.array(many[7]["response_ids"], np.int32),
            candidate_ids=np.array(many[7]["candidate_ids"], np.int32),
        )
        rows = http.score(prompt_ids, span, ScoreOptions(k=4, want_rank=True)).rows
    for name, expected in (
        ("teacher_logprob", rows.token_logprobs),
        ("teacher_logprobs_at_candidates", rows.candidate_logprobs),
        ("teacher_topk_ids", rows.topk_ids),
        ("rank", rows.token_ranks),
    ):
        assert expected is not None
        found = np.array(seventh[name].tolist(), expected.dtype)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)


def test_recorded_rollouts_go_in_as_the_table_they_are(teacher: Teacher) -> None:
    """What the student knew of its own tokens comes along."""
    columns = {
        "prompt": [PROMPT] * 2,
        "prompt_ids": [[3, 4, 5]] * 2,
        "response": ["01", "0"],
        "response_ids": [[6, 7], [8]],
        "behavior_logprobs": [[-1.0, -2.0], [-3.0]],
        "student_topk_ids": [[[6, 9], [7, 9]], [[8, 9]]],
        "student_topk_logprobs": [[[-1.0, -2.0], [-2.0, -3.0]], [[-3.0, -4.0]]],
    }
    table = pa.table(columns)
    frames = [teacher.analyze(each, k=2, policy={}) for each in (table, table.to_pandas())]
    for frame in frames:
        assert frame["token_id"].tolist() == [6, 7, 8]
        assert frame["behavior_logprob"].tolist() == [-1.0, -2.0, -3.0]
        assert [list(row) for row in frame["candidate_logprobs"]][2] == [-3.0, -4.0]
        assert frame.attrs["rollouts"][0]["policy"]["metric"] == "overlap_ratio"
        assert frame.attrs["rollouts"][0]["prompt_ids"] == [3, 4, 5]
    columns["behavior_logprobs"] = [[-1.0], [-3.0]]
    with pytest.raises(ValueError, match="behavior_logprobs has 1 entries, the response 2 tokens"):
        teacher.analyze(pa.table(columns))


def test_a_policy_is_a_record_or_a_mapping(teacher: Teacher) -> None:
    record = DriftPolicy(metric=TeacherTopPAccept(k=3, top_p=0.9), w_drop=0.5)
    mapping = {"metric": "teacher_top_p_accept", "k": 3, "top_p": 0.9, "w_drop": 0.5}
    one, other = (
        teacher.reports(prompt=PROMPT, response=RESPONSE, k=3, policy=policy)[0]
        for policy in (record, mapping)
    )
    assert one["policy"] == other["policy"]
    assert one["bad_events"] == other["bad_events"]
    with pytest.raises(InvalidRequestError, match="which compares candidate_ids") as caught:
        teacher.reports(
            [RESPONSE, RESPONSE], prompt=PROMPT, policy=DriftPolicy(metric=OverlapRatio(k=2))
        )
    assert caught.value.__notes__ == ["of rollout 0"]


def test_a_rollout_that_is_not_answered_is_raised_or_left_out_by_number(teacher: Teacher) -> None:
    many = [RESPONSE, [9999], RESPONSE]
    with pytest.raises(InvalidRequestError, match=r"response_ids\[0\] is 9999") as caught:
        teacher.analyze(many, prompt=PROMPT)
    assert caught.value.__notes__ == ["of rollout 1"]
    frame = teacher.analyze(many, prompt=PROMPT, on_error="skip")
    assert set(frame["rollout"]) == {0, 2}
    assert "9999" in frame.attrs["errors"][1]


def test_responses_and_policies_are_compared(teacher: Teacher) -> None:
    responses = [{"name": "long", "response": RESPONSE}, RESPONSE[:9]]
    policies = [{"top_p": 0.5, "w_drop": 0.5}, {"top_p": 0.99}]
    frame = teacher.compare(responses, policies=policies, prompt=PROMPT, k=3)
    sizes = frame.groupby(["response", "policy"]).size().tolist()
    assert sizes == [len(RESPONSE)] * 2 + [9] * 2
    assert frame["name"].tolist()[0] == "long"
    first, second = frame.attrs["responses"]
    assert second["common_prefix_tokens"] == 9
    bad = frame.groupby(["response", "policy"])["bad_event"].sum().tolist()
    assert bad[:2] == [judged["num_bad_events"] for judged in first["judgements"]]
    assert teacher.compare([RESPONSE], prompt=PROMPT)["policy"].isna().all()
    with pytest.raises(InvalidRequestError, match="9999"):
        teacher.compare([[9999]], prompt=PROMPT)


async def test_the_asynchronous_one_answers_the_same(server: LiveServer, teacher: Teacher) -> None:
    many = rollouts(3)
    async with AsyncTeacher(server.http_address) as other:
        assert (await other.info()) == teacher.info()
        frame = await other.analyze(many, k=4)
        reports = await other.reports(many, k=4)
        compared = await other.compare([RESPONSE], prompt=PROMPT)
        with pytest.raises(InvalidRequestError, match="k is 4000"):
            await other.analyze(many, k=4000)
    expected = await asyncio.to_thread(teacher.analyze, many, k=4)
    assert frame.equals(expected)
    assert len(reports) == 3
    assert len(compared) == len(RESPONSE)


def test_html_in_a_token_stays_text(teacher: Teacher) -> None:
    (report,) = teacher.reports(prompt=PROMPT, response="<script>1")
    (warning,) = report["warnings"]
    assert (warning["reason"], warning["field"]) == ("unknown_text", "response")
    assert warning["positions"] == [0]
    assert len(report["response_ids"]) == 9


@pytest.mark.parametrize("page", ["analysis.md", "wire.md"])
def test_the_requests_of_the_documents_are_answered(server: LiveServer, page: str) -> None:
    text = (ROOT / "docs" / page).read_text("utf-8")
    requests = re.findall(
        r"8080(/v1/\w+) -H '([\w-]+): ([\w/]+)'[\s\\]+-d '(.*?)'", text, re.DOTALL
    )
    assert requests
    for path, name, value, body in requests:
        url = f"http://{server.http_address}{path}"
        reply = httpx.post(url, content=body.encode(), headers={name: value}, timeout=LIMIT_S)
        assert reply.status_code == 200, (path, reply.text)


def test_the_cell_of_the_document_makes_a_table(server: LiveServer) -> None:
    text = (ROOT / "docs" / "analysis.md").read_text("utf-8")
    source = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert "127.0.0.1:8080" in source
    names: dict[str, Any] = {}
    *setup, question = source.replace("127.0.0.1:8080", server.http_address).splitlines()
    exec("\n".join(setup), names)  # our own file
    frame = eval(question, names)
    names["teacher"].close()
    told = set(re.findall(r"`(\w+)`", text.split("One row a token:")[1].split("What is not")[0]))
    assert set(frame.columns) == told


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebook_runs_as_plain_python(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_HTTP", server.http_address)
    names: dict[str, Any] = {}
    for source in cells():
        exec(compile(source, "cell", "exec"), names)  # our own file
    names["teacher"].close()
    assert names["report"]["warnings"][0]["positions"] == [8, 14]
    assert names["frame"]["rollout"].nunique() == 3


def test_the_notebook_shows_what_it_printed_when_it_was_run() -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code)
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]


@in_the_long_round
def test_the_notebook_runs_in_a_kernel(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("TEACHER_HTTP", server.http_address)
    NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=120).execute()


def test_without_pandas_a_table_names_the_extra_and_reports_are_plain() -> None:
    code = """
import sys
sys.modules["pandas"] = None
from teacher_client import Teacher
assert not {"pandas", "pyarrow", "torch"} & {n for n in sys.modules if sys.modules[n]}
try:
    Teacher("127.0.0.1:1").analyze(prompt="a", response="b")
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "pip install 'driftline-client[pandas]'" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("address", "how", "url", "token"),
    [
        ("teacher:8080", {}, "http://teacher:8080", ""),
        ("secret@teacher:8080", {}, "http://teacher:8080", "secret"),
        ("https://a%2Fb@teacher/", {}, "https://teacher", "a/b"),
        ("http://secret@[::1]:80", {"token": "other"}, "http://[::1]:80", "other"),
    ],
)
def test_the_token_comes_from_the_address_or_the_argument(
    address: str, how: dict[str, str], url: str, token: str
) -> None:
    asking = Questions(address, **how).info()
    request = next(asking)
    assert not isinstance(request, float)
    assert request.where == f"{url}/v1/info"
    assert request.arguments["headers"].get("authorization", "") == (
        f"Bearer {token}" if token else ""
    )


def test_a_token_in_an_address_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with Teacher("secret@192.0.2.1:1", limits=QUICK, timeout_s=0.05) as teacher:
            with pytest.raises(Exception, match=r"192\.0\.2\.1") as caught:
                teacher.info()
    assert "in the clear" in caplog.text
    assert "secret" not in caplog.text + str(caught.value)


def test_rollouts_of_every_form_become_items() -> None:
    assert rows_of("abc") == [{"response": "abc"}]
    assert rows_of([[1, 2], "x", {"response": "y"}]) == [
        {"response_ids": [1, 2]},
        {"response": "x"},
        {"response": "y"},
    ]
    assert [list(row["response_ids"]) for row in rows_of(np.array([1, 2]))] == [[1, 2]]
    with pytest.raises(TypeError, match="a rollout is float"):
        rows_of([1.5])
    common = {"prompt": "p", "k": 3, "policy": None}
    assert item_of({"response": float("nan"), "response_ids": [1]}, common) == {
        "prompt": "p",
        "response_ids": [1],
        "k": 3,
    }
    with pytest.raises(InvalidRequestError, match="rows of different lengths"):
        item_of({"response_ids": [1, 2], "candidate_ids": [[1], [1, 2]]}, common)
    with pytest.raises(TypeError, match="unknown argument tempreature"):
        next(Questions("x:1").reports("abc", None, tempreature=1.0))


def items(lengths: Sequence[int]) -> list[dict[str, Any]]:
    return [{"response_ids": [1] * length, "k": 10} for length in lengths]


def test_batches_hold_what_an_answer_may_and_lose_nothing() -> None:
    lengths = [100] * 70 + [MAX_ENTRIES // 10 + 1, 5, MAX_ENTRIES // 20, MAX_ENTRIES // 20, 7]
    batches, sizes = Batches(items(lengths), QUICK), []
    while (body := batches.next()) is not None:
        sizes.append([len(item["response_ids"]) for item in body["items"]])
        assert batches.take({"items": [{"of": item} for item in body["items"]]}) == 0.0
    assert [length for size in sizes for length in size] == lengths
    for size in sizes:
        assert len(size) <= 32
        assert len(size) == 1 or sum(size) * 10 <= MAX_ENTRIES
    assert [len(batches.reports[i]["of"]["response_ids"]) for i in range(len(lengths))] == lengths


def test_an_item_that_met_a_full_server_is_asked_for_again_after_its_hint() -> None:
    full = {"reason": "OVERLOADED", "message": "full", "retry_after_ms": 100}
    wrong = {"reason": "INVALID_REQUEST", "message": "k is 9", "retry_after_ms": 0}
    batches = Batches(items([1, 2, 3]), RetryLimits(capacity_wait_s=0.1))
    assert batches.next()
    pause_s = batches.take({"items": [{"error": full}, {"error": wrong}, {"r": 1}]})
    assert 0.07 < pause_s < 0.16
    body = batches.next()
    assert body is not None
    assert [len(item["response_ids"]) for item in body["items"]] == [1]
    for _ in range(3):
        batches.take({"items": [{"error": full}]})
        if batches.next() is None:
            break
    assert {index: type(error) for index, error in batches.errors.items()} == {
        0: CapacityError,
        1: InvalidRequestError,
    }
    assert set(batches.reports) == {2}


class Full(BaseHTTPRequestHandler):
    """Answers 429 once, then as asked."""

    answers: list[tuple[int, dict[str, Any]]]

    def do_GET(self) -> None:
        status, content = self.answers.pop(0)
        body = to_json(content)
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(*answers: tuple[int, dict[str, Any]]) -> Iterator[str]:
    Full.answers = list(answers)
    server = HTTPServer(("127.0.0.1", 0), Full)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_full_server_is_asked_again_and_one_that_is_not_there_a_few_times() -> None:
    full = {"error": {"reason": "OVERLOADED", "message": "full", "retry_after_ms": 1}}
    with answering((429, full), (200, {"model_id": "m"})) as address, Teacher(address) as teacher:
        assert teacher.info() == {"model_id": "m"}
    limits = RetryLimits(max_resends=2, first_backoff_s=0.001)
    with Teacher(address, limits=limits) as teacher:
        with pytest.raises(NotReadyError, match="given up after 2"):
            teacher.info()


def test_patience_tells_the_pause_that_it_takes() -> None:
    patience = Patience(RetryLimits(max_resends=1, first_backoff_s=0.4, max_backoff_s=0.4))
    assert 0.1 <= patience.pause_s(NotReadyError("gone")) <= 0.4
    with pytest.raises(NotReadyError, match="given up after 1"):
        patience.pause_s(NotReadyError("gone"))
