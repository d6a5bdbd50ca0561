"""Cores that an engine is told to run on. Run: python -m pytest tests/faults/test_cores.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from student_trainer.assembly import from_settings
from student_trainer.errors import ConfigError
from student_trainer.settings.config import load_config
from teacher_server.cli import main
from tests.trainer.learner.tiny_student import write_tiny_student
from tests.trainer.settings.smallest_config import SMALLEST
from vllm_process.cores import CoresError, check_cores, children_on, wait_briefly

HERE = sorted(os.sched_getaffinity(0))
ABSENT = max(HERE) + 1
"""There is no such core, or this process is kept from it."""


def test_cores_that_are_there_are_taken() -> None:
    for cores in ("auto", "shared", "shared:1", str(HERE[0]), ",".join(map(str, HERE))):
        check_cores(cores)


def test_a_core_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(CoresError, match=rf"names core {ABSENT}, and this process may use"):
        check_cores(f"{HERE[0]},{ABSENT}")
    more = len(HERE) + 1
    with pytest.raises(CoresError, match=rf"asks for {more} threads, and this process may use"):
        check_cores(f"shared:{more}")


def test_a_teacher_with_more_cores_than_there_are_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_tiny_student(tmp_path))
    words = ["serve", "--model", model, "--cpu-cores", str(ABSENT), "--grpc-port", "0"]
    assert main([*words, "--http-port", "0"]) == 2
    told = capsys.readouterr().err
    assert f"cpu_cores is '{ABSENT}', which names core {ABSENT}, and this process may use" in told
    assert "name those" in told


def test_a_trainer_with_more_cores_than_there_are_does_not_start(tmp_path: Path) -> None:
    student = write_tiny_student(tmp_path / "student")
    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST)
    config = load_config(path, [f'sampler.cpu_cores="{ABSENT}"', f"student.model={student}"])
    with pytest.raises(ConfigError, match=rf"sampler.cpu_cores is '{ABSENT}', which names core"):
        from_settings.sampler(config, str(student))


@pytest.mark.parametrize(
    ("cores", "expected", "threads", "passive"),
    [
        (str(HERE[-1]), HERE[-1:], 1, False),
        ("shared", HERE, len(HERE), True),
        ("shared:1", HERE, 1, True),
        ("auto", HERE, 77, False),
    ],
)
def test_children_run_on_the_cores_that_are_set_and_this_process_where_it_did(
    cores: str, expected: list[int], threads: int, passive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    said = "import json, os; print(json.dumps([sorted(os.sched_getaffinity(0)), dict(os.environ)]))"
    before = dict(os.environ)
    with children_on(cores):
        out = subprocess.run([sys.executable, "-c", said], capture_output=True, check=True)
    found, environment = json.loads(out.stdout)
    assert found == expected
    assert environment["OMP_NUM_THREADS"] == str(threads)
    assert (environment.get("OMP_WAIT_POLICY") == "passive") is passive
    assert (environment.get("GOMP_SPINCOUNT") == "0") is passive
    assert sorted(os.sched_getaffinity(0)) == HERE
    assert dict(os.environ) == before


def test_a_trainer_gives_its_cores_away_when_it_has_waited_a_little_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that what is set here does not outlive the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setattr("vllm_process.cores._set_here", set())
    wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["KMP_BLOCKTIME"] == "1"
    # An engine with cores of its own spins as it always did; what somebody else set is his.
    with children_on(str(HERE[0])):
        assert "OMP_WAIT_POLICY" not in os.environ
        assert os.environ["GOMP_SPINCOUNT"] == "7"
    with children_on("shared"):
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_a_trainer_says_how_it_waits_before_an_openmp_is_loaded() -> None:
    said = "import sys, student_trainer.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", said], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "False"
