"""Trackers are told what the folder is told, with their own libraries, offline; none ends a run.

Run: python -m pytest tests/trainer/recording/test_trackers.py
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from student_trainer.diagnostics.step_report import EvalReport
from student_trainer.recording.trackers.sink import TrackerSink
from tests.trainer.made_reports import step_report
from tests.trainer.test_train import (
    InMemoryClient,
    client,
    configured,
    folder,
    records,
    run_through,
)

__all__ = ["client", "folder"]


class Failing:
    """A tracker that fails on some steps, and when it is closed."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.told: list[tuple[int, str]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step in self.steps:
            raise ConnectionError("the network\nis away")
        self.told += [(step, name) for name in values if name.endswith(("/loss", "/accuracy"))]

    def close(self) -> None:
        raise ConnectionError("still")


def test_a_tracker_that_fails_is_said_once_and_told_what_comes_after() -> None:
    said: list[str] = []
    tracker = Failing(2, 3)
    sink = TrackerSink("wandb", lambda: tracker, said.append)
    sink.evaluation(EvalReport(step=0, accuracy=0.5))
    for step in (1, 2, 3, 4):
        sink.step(step_report(step))
    sink.close()
    assert tracker.told == [(0, "eval/accuracy"), (1, "update/loss"), (4, "update/loss")]
    assert said == [
        "trackers.report_to wandb: ConnectionError: the network is away; the run goes on, what it "
        "missed is in the folder"
    ]


def test_a_tracker_that_cannot_start_is_said_and_told_nothing(
    folder: Path,
    client: InMemoryClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What an import of a package that is not there finds.
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = configured(
        folder, "run.steps=1", "eval.pass_k=0", 'trackers.report_to=["wandb","trackio"]'
    )
    run_through(config)
    said = " ".join(capsys.readouterr().out.split())
    for name in ("wandb", "trackio"):
        assert said.count(f"trackers.report_to {name}: ") == 1
        assert f"pip install 'driftline[{name}]', the run goes on without" in said
    assert len(records(config, "step")) == 1
    assert not (config.run.out / "tensorboard").exists()


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers write to the folder of the test and speak to nobody."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


def stopped_and_resumed(folder: Path, tracker: str) -> tuple[Path, dict[str, str]]:
    """A run of two steps that goes on for a third; its folder, and the identities it kept."""
    told = (f'trackers.report_to=["{tracker}"]', "trackers.name=tiny", "eval.pass_k=0")
    config = configured(folder, "run.steps=2", *told)
    run_through(config)
    kept = identities(config.run.out)
    run_through(configured(folder, "run.steps=3", *told), resume=True)
    assert identities(config.run.out) == kept
    return config.run.out, kept


def identities(out: Path) -> dict[str, str]:
    """What trackers call a run."""
    found: dict[str, str] = json.loads((out / "run.json").read_text()).get("trackers", {})
    return found


def records_in(path: Path) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    content, start, record = path.read_bytes(), 7, b""
    while start + 7 <= len(content):
        if 32768 - start % 32768 < 7:  # no room for a header: the block is padded
            start += 32768 - start % 32768
            continue
        size, kind = int.from_bytes(content[start + 4 : start + 6], "little"), content[start + 6]
        record += content[start + 7 : start + 7 + size]
        start += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_goes_on_with_the_same_run(
    folder: Path, client: InMemoryClient, local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    from wandb.proto import wandb_internal_pb2

    out, kept = stopped_and_resumed(folder, "wandb")
    assert "trackers.report_to" not in capsys.readouterr().out
    wandb.teardown()  # its process writes on after a run has finished, until it ends with ours
    runs = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2
    assert {path.name for path in runs} == {f"run-{kept['wandb']}.wandb"}
    losses: dict[float, float] = {}
    names = set()
    for path in runs:
        for data in records_in(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.run.run_id:
                names.add((record.run.run_id, record.run.project, record.run.display_name))
            values = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            if "update/loss" in values:
                losses[values["step"]] = values["update/loss"]
    assert names == {(kept["wandb"], "driftline", "tiny")}
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses == {r["step"]: r["loss"] for r in written if r["kind"] == "step"}


def test_trackio_goes_on_with_the_same_run(
    folder: Path, client: InMemoryClient, local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = folder / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(store))  # read once, by the import
    pytest.importorskip("trackio", reason="the extra `trackio` is not installed")
    out, kept = stopped_and_resumed(folder, "trackio")
    (path,) = [Path(found) for found in store.glob("*.db")]
    assert path.name == "driftline.db"
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {row[0] for row in rows} == {f"tiny-{kept['trackio']}"}
    told = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = {step: values["update/loss"] for step, values in told if "update/loss" in values}
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses == {r["step"]: r["loss"] for r in written if r["kind"] == "step"}


def test_tensorboard_of_a_resumed_run_has_every_step_once(
    folder: Path, client: InMemoryClient
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = stopped_and_resumed(folder, "tensorboard")[0]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("update/loss")] == [1, 2, 3]
