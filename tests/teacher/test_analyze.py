"""`teacher-server analyze`: rollouts from anywhere, scored in process and by a running teacher.

Run: python -m pytest tests/teacher/test_analyze.py
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from rollout_records.errors import RecordingError
from rollout_records.reading import origin, read_rollout, read_table
from rollout_records.schema import Origin
from rollout_records.writing import write_step
from run_report.drawing import Chart
from teacher_server import cli
from teacher_server.analyze.rows import check_fits, given, read_rows
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.process import scorers
from teacher_server.process.analysis import analyzed, drift_policy
from teacher_server.testing import local_teacher
from teacher_wire.errors import InvalidRequestError
from tests.records.made_rows import made_row

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "playground" / "checkpoints"
TEACHER = CHECKPOINTS / "teacher"
IDS = {"prompt_ids": [5, 6], "response_ids": [7, 8, 9]}


class Letters:
    """A tokenizer of small letters; others are lost."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(c) - 97 for c in text if "a" <= c <= "z"]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in token_ids)


def test_text_and_ids_become_the_same_row() -> None:
    text = given("f:1", {"prompt": "ab", "response": "cd", "other": object}, Letters())
    ids = given("f:1", {"prompt_ids": [0, 1], "response_ids": [2, 3]}, Letters())
    for row in (text, ids):
        assert (row.prompt, row.response, row.loses_text) == ("ab", "cd", False)
        assert row.prompt_ids.tolist() == [0, 1]
        assert row.response_ids.tolist() == [2, 3]
        assert row.mask.all()
    assert given("f:1", {"prompt": "a!b", "response": "c"}, Letters()).loses_text
    whole = {**IDS, "candidate_ids": [[1, 2]] * 3, "candidate_logprobs": [[-1, -2.5]] * 3}
    whole |= {"mask": [True, False, True], "id": 17, "answer": 4, "correct": False}
    row = given("f:1", whole, None)
    assert row.candidate_ids is not None
    assert row.candidate_ids.shape == (3, 2)
    assert row.candidate_logprobs is not None
    assert row.candidate_logprobs.dtype == np.float32
    assert row.others == {"prompt_id": "17", "answer": "4", "correct": False}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response_ids": [1]}, r"needs `prompt` or `prompt_ids`, has \['response_ids'\]"),
        ({"prompt": 5, "response": "a"}, "prompt must be text, is 5"),
        ({"prompt_ids": [1], "response": "a"}, "response is text, and no tokenizer is known"),
        (IDS | {"prompt_ids": [1, -2]}, r"prompt_ids must be a list of token ids, is \[1, -2\]"),
        (IDS | {"prompt_ids": [1, True]}, "prompt_ids must be a list of token ids"),
        (IDS | {"prompt_ids": [2**31]}, "prompt_ids must be a list of token ids"),
        (IDS | {"prompt_ids": []}, "prompt has no token"),
        (IDS | {"response_ids": []}, "response has no token"),
        (IDS | {"candidate_ids": [[1], [2]]}, "candidate_ids must be 3 lists of token ids, one a"),
        (IDS | {"candidate_ids": [[1], [2, 3], [4]]}, "candidate_ids must be 3 lists"),
        (IDS | {"candidate_ids": [[1.5]] * 3}, "candidate_ids must be 3 lists"),
        (IDS | {"student_topk_ids": [[-1]] * 3}, r"student_topk_ids spans \[-1, -1\]"),
        (
            IDS | {"candidate_logprobs": [[-1.0]] * 3},
            "candidate_logprobs are 3 by 1, must be one for each of candidate_ids, and there",
        ),
        (
            IDS | {"candidate_ids": [[1, 2]] * 3, "candidate_logprobs": [[-1.0]] * 3},
            "candidate_logprobs are 3 by 1, must be one for each of candidate_ids, and they are 3",
        ),
        (
            IDS | {"candidate_ids": [[1]] * 3, "candidate_logprobs": [[float("nan")]] * 3},
            "candidate_logprobs holds a value that is not finite",
        ),
        (
            IDS | {"candidate_ids": [[1]] * 3, "candidate_logprobs": [[-1e300]] * 3},
            "candidate_logprobs holds a value that is not finite in 32 bits",
        ),
        (
            IDS | {"candidate_ids": [[1]] * 3, "candidate_logprobs": [[-1.0], [1e30], [-1.0]]},
            r"candidate_logprobs holds 1e\+30, must be log-probs, at most 0",
        ),
        (
            IDS | {"behavior_logprobs": [-1, -(10**400), -1]},
            "behavior_logprobs holds a value that is not finite",
        ),
        (IDS | {"prompt": "a\ud800"}, r"prompt holds half a character \('\\ud800', at 1\)"),
        (IDS | {"response": "\udc00"}, "response holds half a character"),
        (IDS | {"id": "\udc00"}, "prompt_id holds half a character"),
        (IDS | {"step": "\udc00"}, r'step must be int, is "\\udc00"'),
        (IDS | {"mask": [True, False]}, "mask must be a list of 3 true or false, one a response"),
        (IDS | {"mask": [1, 0, 1]}, "mask must be a list of 3 true or false"),
        (
            IDS | {"behavior_logprobs": [-1, -2, "x"]},
            "behavior_logprobs must be a list of 3 numbers",
        ),
        (IDS | {"step": "3"}, 'step must be int, is "3"'),
        (IDS | {"step": 2**40}, "step is 1099511627776, must have 32 bits"),
        (IDS | {"correct": 1}, "correct must be bool, is 1"),
    ],
)
def test_a_bad_row_is_named_with_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordingError, match=f"^f:3: {message}"):
        given("f:3", row, None)


def test_a_row_that_the_teacher_cannot_score_is_named_with_field_and_limit() -> None:
    row = given("f:3", IDS | {"candidate_ids": [[1, 2], [3, 99], [4, 5]]}, None)
    limits = {"vocab_size": 100, "max_context": 5, "max_k": 2}
    check_fits(row, **limits)
    for change, message in (
        ({"vocab_size": 99}, r"candidate_ids\[1\]\[1\] is 99, the teacher has the ids up to 98"),
        ({"vocab_size": 9}, r"response_ids\[2\] is 9, the teacher has the ids up to 8"),
        ({"max_context": 4}, "prompt and response have 5 tokens, the teacher takes 4"),
        ({"max_k": 1}, "candidate_ids has 2 a token, the teacher takes 1"),
    ):
        with pytest.raises(RecordingError, match=f"^f:3: {message}"):
            check_fits(row, **(limits | change))


def test_files_that_are_cut_or_none_are_named(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    notes: list[str] = []
    assert list(read_rows(lines, notes)) == [(f"{lines}:1", {"a": 1}), (f"{lines}:3", {"a": 2})]
    assert notes == [f"{lines}:4: the last line is not whole, and left out."]
    for text, message in (
        ('{"a": \n{}\n', ":1: not JSON"),
        ("[1]\n", r":1: must be an object, is \[1\]"),
        (b'{"a": "\xff"}\n', ":1: not JSON"),
    ):
        lines.write_bytes(text if isinstance(text, bytes) else text.encode())
        (_, error), *others = read_rows(lines, notes)
        assert isinstance(error, RecordingError)
        assert re.search(message, str(error))
        assert [row for _, row in others] == [{}] * (len(text.splitlines()) - 1)
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt_ids": [[1, 2]], "response_ids": [[3]]}), table)
    assert [row for _, row in read_rows(table, notes)] == [
        {"prompt_ids": [1, 2], "response_ids": [3]}
    ]
    table.write_bytes(table.read_bytes()[:-60])
    for path, message in (
        (table, "cut short, or no Parquet file, after 0 rows"),
        (tmp_path / "rows.csv", "no such file"),
        (lines.rename(tmp_path / "rows.txt"), r"must end in \.jsonl or \.parquet"),
    ):
        with pytest.raises(RecordingError, match=f"{path.name}: {message}"):
            list(read_rows(path, notes))


def test_a_policy_that_is_none_is_named() -> None:
    policy = drift_policy({"k": 4, "threshold": 0.7, "w_drop": 0.1, "stop_in_flight": True})
    assert (policy.metric.k, policy.w_drop, policy.stop_in_flight) == (4, 0.1, False)
    for settings, message in (
        ({"metric": "odd"}, "drift metric is 'odd', must be one of overlap_ratio"),
        ({"top_p": 0.9}, "drift top_p: not read by overlap_ratio, which reads k, metric"),
        ({"threshold": 7}, r"drift threshold is 7, must be in"),
        ({"k": "many"}, "drift k is 'many', must be a whole number"),
        ({"w_drop": "a"}, "drift w_drop is 'a', must be a number"),
        ({"metric": ["a"]}, r"drift metric is \['a'\], must be one of overlap_ratio"),
        ([1], r"--policy must be an object or null, is \[1\]"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            drift_policy(settings)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pictures look like is tests/reports' affair."""
    monkeypatch.setattr(Chart, "svg", lambda chart: f"<svg>{chart.name}</svg>")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Worked solutions of the playground as text, with candidates; and one that has none."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    rng = np.random.default_rng(0)
    lines = []
    for line in (CHECKPOINTS / "heldout.jsonl").read_text().splitlines()[:3]:
        problem = json.loads(line)
        response = problem["solution"][:60]
        num_tokens = len(tokenizer.encode(response, add_special_tokens=False))
        candidates = rng.integers(0, len(tokenizer), (num_tokens, 8))
        logprobs = np.log(rng.dirichlet(np.ones(9), num_tokens)[:, :8])
        lines.append({
            "prompt": problem["prompt"], "response": response, "id": problem.get("id"),
            "candidate_ids": candidates.tolist(), "candidate_logprobs": logprobs.tolist(),
        })  # fmt: skip
    del lines[2]["candidate_ids"], lines[2]["candidate_logprobs"]
    path = tmp_path_factory.mktemp("analyze") / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_is_scored_in_process_and_by_a_running_teacher_alike(
    rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = rows_file.with_name("here.parquet"), rows_file.with_name("there.parquet")
    command = ["analyze", str(rows_file), "--temperature", "0.7"]
    assert cli.main([*command, "--model", str(TEACHER), "--rows", str(here)]) == 0
    said = capsys.readouterr()
    assert said.out == f"3 rollouts scored: {rows_file.with_suffix('.html')}\n"
    assert "1 of 3 rows have no candidate_ids" in said.err

    async def by_a_server() -> int:
        engine = HfEngine(model=str(TEACHER), dtype="float32", device="cpu", max_k=64)
        await engine.start()
        async with local_teacher(engine) as teacher:
            asked = [*command, "--address", teacher.address, "--rows", str(there)]
            asked += ["--tokenizer", str(TEACHER), "--out", str(there.with_suffix(".html"))]
            return await analyzed(cli.build_parser(with_settings=False).parse_args(asked))

    assert asyncio.run(by_a_server()) == 0
    ours, theirs = read_table([here]), read_table([there])
    assert ours.num_rows == 3
    for name in ours.column_names:
        a, b = ours.column(name).to_pylist(), theirs.column(name).to_pylist()
        if ours.column(name).null_count == 3:
            assert theirs.column(name).null_count == 3, name
        elif name.endswith("logprobs") or name in ("reverse_kl", "entropies"):
            np.testing.assert_allclose(_flat(a), _flat(b), atol=5e-3, err_msg=name)
        elif not name.startswith("mean_"):
            assert a == b, name
    assert "how unlikely" not in rows_file.with_suffix(".html").read_text()
    told = origin(here)
    assert (told.temperature, told.tokenizer) == (0.7, str(TEACHER))
    assert told.drift_policy is not None
    assert told.drift_policy["stop_in_flight"] is False

    row = read_rollout([here], 0)
    # Candidates at random: hardly anything in common, and R is gone soon.
    assert row["mean_overlap"] < 0.5
    assert row["num_bad_events"] > 0
    assert read_rollout([here], 2)["overlap"] is None


def _flat(values: list[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.ravel(v) for v in values if v is not None]).astype(np.float64)


def test_recorded_rollouts_are_taken_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = {"metric": "overlap_ratio", "k": 3, "threshold": 0.5, "w_drop": 0.25}
    told = Origin(tokenizer=str(TEACHER), student="s", drift_policy=policy, temperature=0.5)
    rows = [made_row(i, step=4, vocab=60, finish="truncated") for i in range(2)]
    path = write_step(tmp_path / "run", 4, 0, rows, told)
    out = tmp_path / "scored.parquet"
    command = ["analyze", str(path), "--model", str(TEACHER), "--rows", str(out)]
    assert cli.main(command) == 0
    assert "warning" not in capsys.readouterr().err
    for index, row in enumerate(rows):
        scored = read_rollout([out], index)
        for name in ("response_ids", "student_topk_ids", "mask", "step", "prompt_id", "finish"):
            np.testing.assert_array_equal(scored[name], row[name])
        assert scored["teacher_topk_ids"].shape == (12, 8)
        assert scored["reliability"] is not None
    again = origin(out)
    assert (again.temperature, again.student) == (0.5, "s")
    assert again.drift_policy is not None
    assert again.drift_policy["k"] == 3


def test_what_cannot_be_analysed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers, "CONNECT_S", 0.2)
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt_ids": [1], "response_ids": [2, 3]})
    path.write_text(f'{good}\n{{"prompt_ids": [1], "response_ids": [99999]}}\n{{"prompt": 3}}\n')
    command = ["analyze", str(path), "--model", str(TEACHER), "--policy", "null"]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"teacher-server: {path}:3: prompt must be text, is 3")
    assert said.count("\n") == 1
    assert cli.main([*command, "--policy", "{}", "--k", "0", "--skip-invalid"]) == 1
    assert capsys.readouterr().err == "teacher-server: --k is 0, must be at least 1\n"
    with pytest.raises(SystemExit):
        cli.main([*command, "--policy", "{"])
    assert "--policy: must be a JSON object or null, is '{'" in capsys.readouterr().err
    path.write_text(f"{path.read_text()}no JSON\n")
    assert cli.main([*command, "--skip-invalid"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("1 rollouts scored")
    assert f"2 rows are left out; the first: {path}:3: prompt must be text" in said.err
    assert (
        f"1 rows do not fit the teacher; the first: {path}:2: response_ids[0] is 99999" in said.err
    )
    page = path.with_suffix(".html").read_text()
    assert "in part" in page
    for wrong, message in (
        (["--model", str(tmp_path / "nothing")], "nothing"),
        (["--address", "127.0.0.1:1"], "127.0.0.1:1"),
    ):
        assert cli.main(["analyze", str(path), "--skip-invalid", *wrong]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
