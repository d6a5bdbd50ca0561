"""Why an engine of vLLM is gone, out of what its processes print, without vLLM.

Run: pytest tests/faults/test_engine_output.py
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vllm_process.output import EngineOutput, last_words

DIES = """
from vllm_process.output import write_where_told

write_where_told()
print("loading")
raise ValueError("Available memory on node 0 (3.1/23.5 GiB) is less than desired")
"""
PRINTED = """\
(EngineCore pid=7) ERROR 11-27 [core.py:1109] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-27 [core.py:1109] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-27 [core.py:1109]   raise ValueError(
(EngineCore pid=7) ERROR 11-27 [core.py:1109] ValueError: Available memory is less than desired
(EngineCore pid=7) ERROR 11-27 [core.py:1109]
Exception: WorkerProc initialization failed due to an exception in a background process.
RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_last_words_of_a_child_are_the_cause_and_its_file_stays(folder: Path) -> None:
    output = EngineOutput("teacher")
    with output.of_children():
        done = subprocess.run([sys.executable, "-c", DIES], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    said = output.cause(RuntimeError("Engine core initialization failed. See root cause above."))
    (file,) = folder.iterdir()
    assert said == (
        "ValueError: Available memory on node 0 (3.1/23.5 GiB) is less than desired; "
        f"its output is in {file}"
    )
    output.close()
    assert "Traceback" in file.read_text()


def test_an_engine_that_said_nothing_is_told_of_by_the_error_and_leaves_no_file(
    folder: Path,
) -> None:
    output = EngineOutput("sampler")
    assert output.cause(RuntimeError("no\nmemory")) == "no memory"
    output.close()
    assert not list(folder.iterdir())


def test_a_process_that_was_not_told_prints_as_ever() -> None:
    done = subprocess.run([sys.executable, "-c", DIES], capture_output=True, text=True)
    assert done.stdout == "loading\n"
    assert "ValueError" in done.stderr


def test_what_only_points_to_a_cause_is_none(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_text(PRINTED)
    assert last_words(path) == "ValueError: Available memory is less than desired"


def test_a_worker_that_was_killed_is_told_of_where_nothing_says_why(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    died = (
        "(EngineCore pid=7) ERROR 11-27 Worker proc VllmWorker-1 died unexpectedly (exit code: -9)"
    )
    path.write_text(f"{died}, shutting down executor.\nRuntimeError: cancelled\n")
    assert last_words(path) == "Worker proc VllmWorker-1 died unexpectedly (exit code: -9)"
    path.write_text(f"MemoryError: no room\n{died}, shutting down.\nRuntimeError: cancelled\n")
    assert last_words(path) == "MemoryError: no room"


def test_a_front_end_that_only_points_above_points_to_the_file_instead(folder: Path) -> None:
    """Above was nothing: the process had been killed."""
    output = EngineOutput("teacher")
    (file,) = folder.iterdir()
    said = output.cause(RuntimeError("EngineCore encountered an issue. See stack trace (above)"))
    assert said == f"a process of it ended without a word; its output is in {file}"
    output.close()
    assert file.exists()


def test_what_a_front_end_logs_goes_to_the_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, logger = EngineOutput("teacher"), logging.getLogger("front-end-of-a-test")
    logger.propagate = False
    with output.of_logger(logger.name):
        logger.addHandler(logging.StreamHandler())
    logger.error("a thousand lines")
    assert capsys.readouterr() == ("", "")
    (file,) = folder.iterdir()
    assert file.read_text() == "a thousand lines\n"
    logger.handlers[0].close()
