"""Files, folders, tables and data sets, whole and broken.

Run: python -m pytest tests/trainer/data/test_sources.py
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from student_trainer.data import RowFields, Source
from student_trainer.data.rows import checked_row
from student_trainer.errors import DatasetError

ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1", "answer": "007"},
    {"prompt": "1+2", "answer": "1.50"},
    {"prompt": "é①", "answer": None},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def answers(path: Path, **more: Any) -> list[str | None]:
    """What the answers of a data set are read as."""
    rows = Source(path=path, **more).rows()
    return [checked_row(where, row, RowFields()).answer for where, row in rows]


def test_json_is_read_as_lines_as_a_list_and_from_gzip(tmp_path: Path) -> None:
    text = "\n".join(LINES)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    (tmp_path / "d.txt").write_text(f"\n{text}\r\n\n", encoding="utf-8")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "f.json").write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")
    for path in sorted(tmp_path.iterdir()):
        assert [row for _, row in Source(path=path).rows()] == ROWS, path.name
        assert answers(path) == ["007", "1.50", None], path.name


def test_a_folder_is_its_files_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "part-1.jsonl").write_text(LINES[1], encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), tmp_path / "part-0.parquet")
    (tmp_path / "README.md").write_text("not data")
    assert answers(tmp_path) == ["007", "1.50"]


def test_an_answer_is_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    written = ["7", "1.50", "-0.0", "1e-3", "123456789012345678901234567890", '"NaN"', '"2020-1-1"']
    path.write_text("\n".join(f'{{"prompt": "x", "answer": {text}}}' for text in written))
    assert answers(path) == [text.strip('"') for text in written]


def test_a_line_that_begins_the_file_may_have_a_mark_of_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES[0].encode())
    assert answers(path) == ["007"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', r":2: byte 0xe9 at 16 .* not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), ":1: not UTF-8 but UTF-16 or UTF-32"),
        ('{"prompt": "a"}'.encode("utf-32"), ":1: not UTF-8 but UTF-16 or UTF-32"),
        (b'[{"prompt": "a"},\n{"prompt": "\xff"}]', ":2: byte 0xff at 13"),
        (b'{"prompt": "a"', ":1: not JSON: "),
        (b'{"prompt": "a", "answer": NaN}', ":1: not JSON: NaN is none of its values"),
        (b'{"prompt": "a", "answer": -Infinity}', ":1: not JSON: -Infinity is none"),
        (b'[{"prompt": "a"}, 3]', r"\[1\]: must be an object, is int"),
        (b'[{"prompt": "a"}', ": not JSON: "),
        (b'{"answer": ' + b"9" * 5000 + b"}", ":1: not JSON: .*digits"),
        (b'{"a": ' + b"[" * 100_000, ":1: not JSON that can be read: nested too deeply"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_by_line(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"^{re.escape(str(path))}{reason}"):
        list(Source(path=path).rows())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        # Without the time of day: every worker of the suite must make the same name of it.
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "not a whole gzip file"),
        ("a.jsonl.gz", b'{"prompt": "a"}', "not a whole gzip file"),
        ("a.parquet", b"PAR1 and no more", "not a whole Parquet file"),
        ("a.parquet", b"", "not a whole Parquet file"),
    ],
)
def test_a_cut_file_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"^{re.escape(str(path))}: {reason}"):
        list(Source(path=path).rows())


def test_a_folder_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not data")
    with pytest.raises(DatasetError, match=r"holds no \.jsonl, .*\.parquet file, and was not"):
        list(Source(path=tmp_path).rows())


def test_columns_of_a_table_are_rows_and_null_is_absent(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}], "answer": 7},
        {"messages": [{"role": "user", "content": "b", "name": "x"}], "answer": None},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = [checked_row(where, row, RowFields()) for where, row in Source(path=path).rows()]
    assert [row.problem for row in read] == [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b", "name": "x"}],
    ]
    assert [row.answer for row in read] == ["7", None]
    assert [row.where for row in read] == [f"{path}[0]", f"{path}[1]"]


def mixed(tmp_path: Path) -> datasets.Dataset:
    """Answers of which one is a number: `datasets` makes a column of JSON of them."""
    path = tmp_path / "mixed.jsonl"
    given_answers = ["007", 7, "NaN", "2020-01-01", 12345678901234567, "1.50", None, 'a "b"']
    path.write_text("\n".join(json.dumps({"prompt": "x", "answer": a}) for a in given_answers))
    loaded = datasets.load_dataset(
        "json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert loaded[0]["answer"] == 7, "or `datasets` has changed, and so may the reader"
    return loaded


MIXED = ["007", "7", "NaN", "2020-01-01", "12345678901234567", "1.50", None, 'a "b"']


def test_what_datasets_makes_another_value_of_is_read_as_it_was(tmp_path: Path) -> None:
    loaded = mixed(tmp_path)
    loaded.save_to_disk(str(tmp_path / "saved"))
    assert answers(tmp_path / "saved") == MIXED
    datasets.DatasetDict({"train": loaded, "other": loaded.select([3, 0])}).save_to_disk(
        str(tmp_path / "splits")
    )
    assert answers(tmp_path / "splits") == MIXED
    assert answers(tmp_path / "splits", split="other") == ["2020-01-01", "007"]
    with pytest.raises(DatasetError, match="has no split 'dev', has train, other"):
        answers(tmp_path / "splits", split="dev")
    loaded.to_parquet(str(tmp_path / "a.parquet"))
    assert answers(tmp_path / "a.parquet") == MIXED


def test_a_data_set_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"^nobody/nothing: cannot be loaded: .*without a net"):
        list(Source(path=Path("nobody/nothing")).rows())
    with pytest.raises(DatasetError, match=r"^data/nothing\.jsonl: no such dataset"):
        list(Source(path=Path("data/nothing.jsonl")).rows())


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"needs .*driftline\[data\]"):
        list(Source(path=Path("openai/gsm8k")).rows())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "from"]), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prompt", "messages", "prompt_ids", "answer", "id", "teacher", "teacher_prompt", "tools"]
)


@settings(max_examples=150, deadline=None)
@given(row=st.dictionaries(NAMES, JSON, max_size=5))
def test_any_row_is_checked_or_refused_by_name(row: dict[str, Any]) -> None:
    refusal = ""
    try:
        assert checked_row("a.jsonl:3", row, RowFields()).problem is not None
    except DatasetError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith("a.jsonl:3: ")


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=60) | st.text('{}[]":,promt1aNul \n', max_size=40).map(str.encode)
)
def test_any_bytes_are_rows_or_refused_by_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    refusal = ""
    try:
        list(Source(path=path).rows())
    except DatasetError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith(str(path))
