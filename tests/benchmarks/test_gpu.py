"""The command for a GPU, on a CPU: what is run, kept and shown; and its parts at a tiny size.

Run: python -m pytest tests/benchmarks/test_gpu.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts, results
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.results import CUT, DONE, FAILED, SKIPPED
from benchmarks.provenance import ROOT
from tests.rounds import in_the_long_round
from tests.waiting import LIMIT_S, wait_until
from vllm_process.children import _lives

CARD = {
    "event": "card",
    "card": "NVIDIA X",
    "device": "cuda",
    "size": "full",
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "product_tflops": 700.0,
    "copy_tb_per_s": 4.0,
    "peak_tflops": None,
}
RIGHT = {"event": "row", "name": "one", "figures": {"gap": 0.5}, "error": None, "fails": False}
WRONG = RIGHT | {"name": "two", "figures": {}, "error": "ValueError: no", "fails": True}
NO_ROOM = WRONG | {"error": "out of memory: of 3 GiB", "fails": False}
SLOW = """\
#!/bin/sh
sleep 600 &
echo "{\\"event\\": \\"row\\", \\"pid\\": $!}"
wait
"""
"""In place of Python."""
BLOCKED = "grpc pydantic vllm peft rich"
AT_TINY = ("parity", "sharded", "--device=cpu", "--size=tiny")
BLOCKER = f"""\
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        blocked = name.split(".")[0] in {BLOCKED.split()!r}
        return None if blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


class Children:
    """What the parts' processes tell, in place of processes; an error is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.card = dict(CARD)
        self.tell: dict[str, list[dict[str, Any] | Exception]] = {}
        self.begun: list[str] = []
        monkeypatch.setattr(gpu, "child", self.child)
        monkeypatch.setattr(parts, "has", lambda name: name != "peft")
        monkeypatch.setattr(results, "commit", lambda: "abc1234")
        monkeypatch.setattr(results, "provenance", lambda: {"commit": "abc1234"})

    def child(self, part: str, flags: Sequence[str], limit_s: float) -> Iterator[dict[str, Any]]:
        if part == "card":
            yield self.card
            return
        self.begun.append(part)
        for event in self.tell.get(part, [RIGHT]):
            if isinstance(event, Exception):
                raise event
            yield event

    def run(self, path: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
        """Exit code, what was said last, the parts in the file."""
        self.begun, said = [], list[str]()
        code = gpu.main(["--json", str(path), *words], said.append)
        return code, said[-1], json.loads(path.read_text())["parts"]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    return Children(monkeypatch)


def test_what_is_done_is_not_run_again_and_what_failed_comes_last(
    children: Children, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    children.tell = {"parity": [RIGHT, WRONG], "learner": [RIGHT, NO_ROOM]}
    code, _, kept = children.run(path, "--parts", "parity", "scoring", "learner")
    assert (code, children.begun) == (1, ["parity", "scoring", "learner"])
    assert {name: kept[name]["state"] for name in kept} == {
        "parity": FAILED,
        "scoring": DONE,
        "learner": DONE,
    }
    children.tell = {}
    code, shown, kept = children.run(path)
    assert code == 0
    assert children.begun == ["sharded", "step", "vllm", "parity"]
    assert list(kept) == list(PARTS)
    assert (kept["lora"]["state"], kept["lora"]["error"]) == (SKIPPED, "needs peft")
    assert "(c) an update of an adapter: skipped\n\nneeds peft" in shown
    assert "NVIDIA X, commit abc1234, torch 2.11.0" in shown
    assert children.run(path)[0] == 0
    assert children.begun == []


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (gpu.PartError("CUDA error: no (exit code 1)"), FAILED),
        (gpu.OutOfTimeError("ended after 30 s"), CUT),
    ],
)
def test_a_part_that_breaks_off_keeps_its_rows_and_the_others_go_on(
    children: Children, tmp_path: Path, error: Exception, state: str
) -> None:
    children.tell = {"parity": [RIGHT, error]}
    code, shown, kept = children.run(tmp_path / "gpu.json", "--parts", "parity", "scoring")
    assert code == (state == FAILED)
    assert (kept["parity"]["state"], kept["parity"]["error"]) == (state, str(error))
    assert [row["name"] for row in kept["parity"]["rows"]] == ["one"]
    assert kept["scoring"]["state"] == DONE
    assert f"{error}\n\n|  | gap |\n| --- | ---: |\n| one | 0.5 |" in shown


def test_of_another_card_or_commit_it_begins_anew(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    one = ("--parts", "parity")
    children.run(path, *one)
    children.card["card"] = "NVIDIA Y"
    children.run(path, *one)
    assert children.begun == ["parity"]
    monkeypatch.setattr(results, "commit", lambda: "def5678-dirty")
    children.run(path, *one)
    assert children.begun == ["parity"]
    assert json.loads(path.read_text())["of"]["code"].startswith("def5678-dirty+")


def test_without_time_nothing_begins_and_what_was_there_stays(
    children: Children, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    children.tell = {"parity": [RIGHT, WRONG]}
    children.run(path, "--parts", "parity")
    code, _, kept = children.run(path, "--minutes", "0", "--parts", "parity", "scoring")
    assert children.begun == []
    assert (code, kept["parity"]["state"], kept["scoring"]["state"]) == (1, FAILED, SKIPPED)


def test_a_process_that_takes_too_long_is_ended_with_what_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And one that fails is told of by its last line."""
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    with pytest.raises(gpu.PartError, match=r"invalid choice: 'none'.* \(exit code 2\)"):
        list(gpu.child("none", [], LIMIT_S))
    program = tmp_path / "python"
    program.write_text(SLOW)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = gpu.child("parity", [], 0.5)
    started = next(found)["pid"]
    with pytest.raises(gpu.OutOfTimeError):
        next(found)
    wait_until(lambda: not _lives(str(started)))


@in_the_long_round
def test_parity_and_fsdp_need_torch_and_transformers_alone(tmp_path: Path) -> None:
    """In a process that cannot import anything else of what a server and a trainer need."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    places = [str(tmp_path), str(ROOT), str(ROOT / "proto")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.child", *AT_TINY],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["event"] == "done"
    rows = lines[:-1]
    assert [row["name"] for row in rows if row["error"]] == []
    assert len(rows) == 17


@in_the_long_round
@pytest.mark.vllm
@pytest.mark.e2e
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    said = list[str]()
    words = ["--json", str(path), "--device", "cpu", "--minutes", "30"]
    assert gpu.main(words, said.append) == 0, said
    kept = json.loads(path.read_text())["parts"]
    assert {name: kept[name]["state"] for name in PARTS} == dict.fromkeys(PARTS, DONE)
