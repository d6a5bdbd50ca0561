"""Recorded rollouts on the disk: what was written is read, whole or not at all, by us and others.

Run: python -m pytest tests/records
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout_records.errors import RecordingError
from rollout_records.measures import reverse_kl
from rollout_records.reading import origin, read_rollout, read_table, steps
from rollout_records.schema import COLUMNS, METADATA_KEY, Origin, Shape
from rollout_records.writing import drop_later, table_of, thin_out, write_step, write_table
from scripts.columns_document import PATH, document
from tests.records.made_rows import made_row
from tests.waiting import LIMIT_S

ORIGIN = Origin(tokenizer="a/model", student="a/model", teachers={"": "b"}, temperature=0.7)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    rows = [made_row(index, tokens=3 + index) for index in range(4)]
    rows[2]["sampled"] = np.array([True, False, True, True, True])
    path = write_step(tmp_path, 1, 0, rows, ORIGIN)
    for row in rows:
        read = read_rollout([path], row["index"])
        for column in COLUMNS:
            written, found = row.get(column.name), read[column.name]
            if written is None:
                assert found is None, column.name
            elif column.name == "started_at":
                assert int(found.timestamp() * 1000) == written
            elif column.shape is not Shape.SCALAR:
                tolerance = 0.0 if column.bits is None else 2.0 ** -(column.bits + 1)
                np.testing.assert_allclose(found, written, rtol=tolerance, err_msg=column.name)
                assert found.dtype == column.kind.to_pandas_dtype()
            else:
                assert found == pytest.approx(written), column.name
    assert origin(path) == ORIGIN


def test_a_rollout_without_candidates_and_one_with_stand_in_one_file(tmp_path: Path) -> None:
    rows = [made_row(0), made_row(1, with_candidates=False, k=7)]
    path = write_step(tmp_path, 1, 0, rows, ORIGIN)
    without = read_rollout([path], 1)
    assert without["student_topk_ids"] is None
    assert without["mean_overlap"] is None
    assert without["teacher_topk_ids"].shape == (12, 7)
    assert read_rollout([path], 0)["student_topk_ids"].shape == (12, 4)


def test_pandas_reads_a_step_in_one_line(tmp_path: Path) -> None:
    row = made_row(0)
    path = write_step(tmp_path, 1, 0, [row, made_row(1)], ORIGIN)
    frame = pd.read_parquet(path)
    assert list(frame.columns) == [column.name for column in COLUMNS]
    np.testing.assert_array_equal(frame.response_ids[0], row["response_ids"])
    np.testing.assert_allclose(frame.teacher_logprobs[0], row["teacher_logprobs"], rtol=5e-4)
    assert len(frame.student_topk_logprobs[0]) == 12


def test_one_rollout_of_many_is_read_by_its_group_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_records.writing.GROUP_TOKENS", 20)
    path = write_step(tmp_path, 1, 0, [made_row(i) for i in range(6)], ORIGIN)
    assert pq.ParquetFile(path).num_row_groups == 3
    read: list[int] = []
    whole = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        if "columns" not in options:
            read.append(group)
        return whole(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert read_rollout([path], 3)["prompt_id"] == "problem-3"
    assert read == [1]


def test_the_files_of_several_processes_are_one_step(tmp_path: Path) -> None:
    write_step(tmp_path, 7, 1, [made_row(1, step=7)], ORIGIN)
    write_step(tmp_path, 7, 0, [made_row(2, step=7), made_row(0, step=7)], ORIGIN)
    write_step(tmp_path, 12, 0, [made_row(0, step=12)], ORIGIN)
    (tmp_path / "step-000013.parquet.99.partial").write_bytes(b"PAR1")
    (tmp_path / "notes.txt").write_text("not ours")
    found = steps(tmp_path)
    assert {step: [path.name for path in paths] for step, paths in found.items()} == {
        7: ["step-000007.parquet", "step-000007.1.parquet"],
        12: ["step-000012.parquet"],
    }
    assert read_table(found[7], ["index", "prompt_id"]).to_pydict() == {
        "index": [0, 1, 2],
        "prompt_id": ["problem-0", "problem-1", "problem-2"],
    }
    assert read_rollout(found[7], 1)["index"] == 1
    assert steps(tmp_path / "nowhere") == {}


def test_what_is_no_recording_is_named(tmp_path: Path) -> None:
    path = write_step(tmp_path, 1, 0, [made_row(0)], ORIGIN)
    whole = path.read_bytes()
    cut, foreign, newer, lacking = (
        tmp_path / f"{name}.parquet" for name in ("cut", "foreign", "newer", "lacking")
    )
    cut.write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"a": [1]}), foreign)
    table = table_of([made_row(0)])
    write_table(newer, table, Origin(version=2))
    told = {METADATA_KEY: json.dumps({"version": 1}).encode()}
    pq.write_table(table.drop_columns(["mask"]).replace_schema_metadata(told), lacking)
    for broken, why in (
        (cut, "cut short"),
        (foreign, "no recorded rollouts"),
        (newer, "version 2, this reads up to 1"),
        (lacking, "lacks the columns mask"),
        (tmp_path / "gone.parquet", "no such file"),
    ):
        with pytest.raises(RecordingError, match=f"{broken.name}: .*{why}"):
            read_table([broken])
        with pytest.raises(RecordingError, match=broken.name):
            read_rollout([broken], 0)
    with pytest.raises(
        RecordingError, match=r"rollout 5 was not recorded, of the step there are 0"
    ):
        read_rollout([path], 5)
    with pytest.raises(RecordingError, match="columns kl: must be of step, index"):
        read_table([path], ["kl"])


def test_bytes_broken_in_the_middle_are_an_error_and_no_numbers(tmp_path: Path) -> None:
    path = write_step(tmp_path, 1, 0, [made_row(i, tokens=200) for i in range(3)], ORIGIN)
    broken = bytearray(path.read_bytes())
    middle = len(broken) // 3
    broken[middle : middle + 400] = bytes(400)
    path.write_bytes(broken)
    with pytest.raises(RecordingError, match=path.name):
        read_table([path])


def test_what_makes_files_small_is_there(tmp_path: Path) -> None:
    """By which 64 bytes a token are kept to (docs/run-folder.md): bits that are 0, bytes that are
    split, and no statistics of what nobody searches."""
    path = write_step(tmp_path, 1, 0, [made_row(i) for i in range(3)], ORIGIN)
    row = read_rollout([path], 0)
    for name, zero_bits in (("teacher_topk_logprobs", 16), ("teacher_logprobs", 13)):
        bits = row[name].view(np.uint32)
        assert (bits & ((1 << zero_bits) - 1) == 0).all()
        assert (bits & (1 << zero_bits)).any(), "and no more of them"
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    for column in columns:
        name = column.path_in_schema.partition(".")[0]
        is_list = column.path_in_schema != name
        assert (column.statistics is None) == is_list, name
        if name in ("teacher_topk_ids", "student_topk_logprobs", "response_ids", "reverse_kl"):
            assert "BYTE_STREAM_SPLIT" in column.encodings


def test_a_column_that_must_be_there_is_asked_for() -> None:
    row = made_row(0)
    del row["mask"]
    with pytest.raises(ValueError, match="column mask must not be null"):
        table_of([row])


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_step(tmp_path, 1, 0, [made_row(0)], ORIGIN)

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
    with pytest.raises(OSError, match="No space"):
        write_step(tmp_path, 1, 0, [made_row(0), made_row(1)], ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    assert len(read_table([path])) == 1


WRITES_FOR_EVER = """
import sys
from pathlib import Path
from rollout_records.schema import Origin
from rollout_records.writing import write_step
from scripts.columns_document import PATH, document
from tests.records.made_rows import made_row
rows = [made_row(i, tokens=400, k=8) for i in range(8)]
for step in range(1, 100_000):
    write_step(Path(sys.argv[1]), step, 0, rows, Origin())
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_whole_files_alone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for _ in range(5):
            assert writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.wait(LIMIT_S)
    found = steps(tmp_path)
    assert len(found) >= 5
    assert all(len(read_table(paths)) == 8 for paths in found.values())
    drop_later(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-00000{step}.parquet" for step in (1, 2, 3)
    ]


def test_thinning_keeps_the_ends_and_spreads_what_is_left(tmp_path: Path) -> None:
    for step in range(1, 18):
        (tmp_path / f"step-{step:06d}.parquet").write_bytes(bytes(10))
        (tmp_path / f"step-{step:06d}.1.parquet").write_bytes(bytes(1000))
    gone = thin_out(tmp_path, 90)
    kept = [int(p.name[5:11]) for p in sorted(tmp_path.glob("step-??????.parquet"))]
    assert kept == [1, 3, 5, 7, 9, 11, 13, 15, 17]
    assert gone == [2, 4, 6, 8, 10, 12, 14, 16]
    assert len(list(tmp_path.glob("*.1.parquet"))) == 17, "those of another process"
    thin_out(tmp_path, 50)
    kept = [int(p.name[5:11]) for p in sorted(tmp_path.glob("step-??????.parquet"))]
    assert kept == [1, 5, 9, 13, 17]
    assert thin_out(tmp_path, 5) == [5, 13, 9, 1], "a limit below one file leaves the newest"


def test_the_kl_of_a_row_is_a_lower_bound_and_exact_on_a_whole_vocabulary() -> None:
    rng = np.random.default_rng(0)
    student, teacher = (np.log(rng.dirichlet(np.ones(6), 50)) for _ in range(2))
    exact = (np.exp(student) * (student - teacher)).sum(axis=1)
    np.testing.assert_allclose(reverse_kl(student, teacher), exact, atol=1e-6)
    order = np.argsort(-student, axis=1)[:, :3]
    some = reverse_kl(*(np.take_along_axis(p, order, axis=1) for p in (student, teacher)))
    assert (some >= 0).all()
    assert (some <= exact + 1e-9).all()
    assert reverse_kl(student[:, :0], teacher[:, :0]).tolist() == [0.0] * 50


def test_the_guide_lists_every_column_with_its_type() -> None:
    assert PATH.read_text(encoding="utf-8") == document(), "run `make docs`"
