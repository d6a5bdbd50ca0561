"""Whatever ends a command is one line with cause and remedy; the causes here are real ones.

Run: pytest tests/trainer/test_failures.py
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer import cli
from student_trainer.errors import CheckpointError, ConfigError, TrainerError
from student_trainer.process.failures import failure_line
from student_trainer.process.writing import writing_to
from student_trainer.train_state import STATE_FILE, TrainState, latest, read_state
from tests.rounds import in_the_long_round
from tests.trainer.learner.tiny_student import (
    character_tokenizer,
    tiny_student,
    write_tiny_student,
)
from tests.waiting import LIMIT_S

SETTINGS = """
[run]
out = "{out}/run"
steps = 1
[student]
model = "{out}/student"
device = "cpu"
[sampler]
kind = "{sampler}"
[data]
train = "{out}/train.jsonl"
heldout = "{out}/train.jsonl"
[rollout]
prompts_per_step = 1
student_topk = 4
max_context = 40
[teacher]
endpoints = ["127.0.0.1:1"]
connect_timeout_s = 0.1
[drift]
k = 4
threshold = 0.7
w_drop = 0.01
[budget]
kind = "fixed"
max_tokens = 4
[loss]
kind = "local_support_matching"
[optim]
learning_rate = 1e-3
[eval]
num_prompts = 1
pass_k = 0
max_tokens = 4
answer_pattern = '(.)'
"""


LASTING = ("ConfigError: ", "DatasetError: ", "AccessError: ", "FileExistsError: ", "NotADirect")
"""What a start again ends with again."""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; a short path, because vLLM makes sockets there."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


@pytest.fixture
def folder(tmp_path: Path, temporary: Path) -> Path:
    """A student and a problem."""
    write_tiny_student(tmp_path / "student")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}))
    return tmp_path


def failed(
    folder: Path,
    command: str,
    *arguments: str,
    capsys: pytest.CaptureFixture[str],
    sampler: str = "hf",
) -> str:
    """The one line that a command ends with; overrides are the arguments with a point and `=`."""
    path = folder / "trainer.toml"
    path.write_text(SETTINGS.format(out=folder, sampler=sampler), encoding="utf-8")
    capsys.readouterr()
    code = cli.main([command, "--config", str(path), *arguments])
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if not line.startswith("warning: ")]
    lasting = line.startswith(LASTING) or (
        line.startswith("CheckpointError: ") and "cannot be written" not in line
    )
    assert code == (2 if lasting else 1), line
    return line


def traceback_named_in(line: str) -> Path:
    found = re.search(r" \(traceback: (.+)\)$", line)
    assert found is not None, line
    path = Path(found[1])
    assert "Traceback (most recent call last):\n" in path.read_text()
    return path


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to write more into any file: EFBIG, as a full disk gives ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_missing_dataset_says_how_to_get_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.jsonl").unlink()
    line = failed(folder, "train", capsys=capsys)
    assert line == (
        f"DatasetError: {folder}/train.jsonl: no such dataset; docs/data.md says how to get or "
        "write one"
    )


def test_a_dataset_that_is_no_text_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.jsonl").write_bytes(b"PAR1\xff\xfe\x00")
    assert "train.jsonl:1: byte 0xff at 5 of the line is not UTF-8" in failed(
        folder, "train", capsys=capsys
    )


def test_a_broken_tokenizer_file_is_a_checkpoint_error_with_a_traceback_in_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "student" / "tokenizer.json").write_text('{"version": ')
    (folder / "run").mkdir()
    line = failed(folder, "train", capsys=capsys)
    assert line.startswith(f"CheckpointError: {folder}/student: cannot load a tokenizer: ")
    assert traceback_named_in(line) == folder / "run" / "error.log"


def test_an_unknown_architecture_is_named(
    folder: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "student" / "config.json"
    path.write_text(path.read_text().replace('"qwen3"', '"never_heard_of"'))
    line = failed(folder, "train", capsys=capsys)
    assert line.startswith(f"CheckpointError: {folder}/student: cannot ")
    assert "never_heard_of" in line
    assert traceback_named_in(line).parent == temporary


def test_weights_that_are_cut_short_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "student" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    line = failed(folder, "train", capsys=capsys)
    assert line.startswith(
        f"CheckpointError: student.model is '{folder}/student': {path} has 1,000 "
    )


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("student.device=cuda:99", "student.device is 'cuda:99': "),
        ("student.device=gpu", "student.device is 'gpu': "),
    ],
)
def test_a_device_that_is_not_there_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, reason: str
) -> None:
    line = failed(folder, "train", "--set", override, capsys=capsys)
    assert line.startswith(f"ConfigError: {reason}")
    assert "traceback" not in line


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ('teacher.endpoints=["http://teacher:1"]', "teacher.endpoints: 'http://teacher:1' must be"),
        ('teacher.endpoints=["https://teacher:1"]', "such as 127.0.0.1:50051, without a scheme"),
        ("run.otlp_endpoint=collector:4318", "run.otlp_endpoint: "),
    ],
)
def test_a_malformed_address_is_refused_before_anything_starts(
    folder: Path, override: str, name: str
) -> None:
    path = folder / "trainer.toml"
    path.write_text(SETTINGS.format(out=folder, sampler="hf"), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(name)):
        cli.load_config(path, [override])


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_configuration_that_cannot_be_read_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = folder / "odd.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert cli.main(["train", "--config", str(path)]) == cli.EXIT_LASTING
    assert capsys.readouterr().err.startswith(f"ConfigError: {path}: ")


def test_a_full_disk_is_named_with_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failed(folder, "eval", "--json", "/dev/full", capsys=capsys)
    assert line.startswith("OSError: No space left on device; free space there (traceback: ")
    assert "write_text" in traceback_named_in(line).read_text()


def test_a_path_below_a_file_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failed(folder, "eval", "--json", f"{folder}/train.jsonl/x.json", capsys=capsys)
    assert f"{folder}/train.jsonl: " in line
    assert "a part of the path is a file: choose another" in line


class State:
    """A part of a run whose state is a tensor of so many numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def state(self) -> dict[str, Any]:
        return {"numbers": torch.zeros(self.size)}

    def load(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def state_of_a_run(folder: Path, part: State) -> TrainState:
    model, tokenizer = tiny_student(), character_tokenizer()

    def save_weights(to: Path) -> None:
        model.save_pretrained(to)
        tokenizer.save_pretrained(to)

    return TrainState(folder, keep=2, save_weights=save_weights, parts={"part": part}, settings={})


@pytest.mark.parametrize(
    "limit",
    [4_096, 300_000, 2_000_000],
    ids=["amid the weights", "early in the state", "halfway through the state"],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_whole(
    folder: Path, limit: int
) -> None:
    """The weights do not fit, or they do and the state of 4 MB beside them does not."""
    part = State(10)
    run = state_of_a_run(folder / "checkpoints", part)
    first = run.save()
    assert (first / "model.safetensors").stat().st_size < 300_000
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert {"model.safetensors", STATE_FILE} <= before.keys()
    run.step, part.size = 1, 1_000_000
    with files_of_at_most(limit), pytest.raises(CheckpointError) as caught:
        run.save()
    said = str(caught.value)
    assert said.startswith(f"{folder}/checkpoints/step-000001: cannot be written (")
    assert re.search(r" \(\d+\.\d GB free\): ", said)
    assert said.endswith("`train --resume` goes on from the last whole one")
    assert [*(folder / "checkpoints").iterdir()] == [latest(folder / "checkpoints")] == [first]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert read_state(first)["step"] == 0
    # With room again it goes on.
    assert read_state(run.save())["part"]["numbers"].shape == (1_000_000,)


def test_a_checkpoint_below_a_file_is_a_checkpoint_error(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="Not a directory"):
        state_of_a_run(folder / "train.jsonl" / "checkpoints", State(1)).save()


def ended(folder: Path, temporary: Path, *arguments: str) -> str:
    """The one line of `student-trainer eval` with vLLM as a process of its own, which must end."""
    path = folder / "trainer.toml"
    path.write_text(SETTINGS.format(out=folder, sampler="vllm"), encoding="utf-8")
    command = [sys.executable, "-m", "student_trainer.cli", "eval", "--config", str(path)]
    done = subprocess.run(
        [*command, *arguments],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == cli.EXIT_FAILED, done.stderr
    return done.stderr.splitlines()[-1]


@in_the_long_round
@pytest.mark.vllm
def test_vllm_that_does_not_start_is_a_sampler_error_with_its_last_words(
    folder: Path, temporary: Path
) -> None:
    """Its process finds the weights cut short; what it says of that is in a file of its own."""
    path = folder / "student" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    line = ended(folder, temporary)
    assert line.startswith(f"SamplerError: vLLM cannot generate with {folder}/student: ")
    assert "safetensor" in line.lower()
    (output,) = re.findall(r"; its output is in (\S+) \(traceback", line)
    assert "Traceback" in Path(output).read_text()
    traceback_named_in(line)


@in_the_long_round  # in a process that has vLLM: rollouts/test_samplers.py
@pytest.mark.vllm
def test_what_vllm_refuses_before_it_starts_is_a_sampler_error(
    folder: Path, temporary: Path
) -> None:
    line = ended(folder, temporary, "--set", "rollout.max_context=100000")
    assert line.startswith(f"SamplerError: vLLM cannot generate with {folder}/student: ")
    assert "max_model_len" in line
    assert "errors.pydantic.dev" not in line
    assert not list(temporary.glob("driftline-sampler-*"))


def test_a_folder_too_long_for_vllms_sockets_is_named_before_it_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 66)
    line = failed(folder, "eval", capsys=capsys, sampler="vllm")
    assert line.startswith("SamplerError: vLLM makes sockets in /tmp/xxx")
    assert line.endswith("may have at most 70 bytes: set TMPDIR to a shorter one")


def test_an_error_of_ours_passes_through_as_it_is(folder: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"^no$"),
        writing_to(folder, CheckpointError, remedy=""),
    ):
        raise ConfigError("no")


def test_memory_that_runs_out_says_what_to_lower() -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError()):
        assert "lower optim.micro_batch_tokens" in failure_line(error)
        assert "\n" not in failure_line(error)


def test_what_nobody_foresaw_is_one_line_and_a_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise KeyError("never\nseen")

    monkeypatch.setattr(cli, "_quiet_libraries", lambda: broken(None))
    line = failed(folder, "eval", capsys=capsys)
    assert line.startswith("unexpected failure: KeyError: 'never\\nseen'; please report it")
    assert "in broken" in traceback_named_in(line).read_text()
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nowhere")
    assert "(traceback: nowhere to write it to)" in failed(folder, "eval", capsys=capsys)


def test_every_error_of_ours_is_one_line() -> None:
    pending: list[type[TrainerError]] = [TrainerError]
    while pending:
        kind = pending.pop()
        expected = "a\nb" if kind is ConfigError else "a b"
        assert failure_line(kind("a\nb")) == f"{kind.__name__}: {expected}"
        pending += kind.__subclasses__()


def test_a_result_of_another_command_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "other.json"
    path.write_text("[1]")
    assert cli.main(["report", str(folder), "--teacher-eval", str(path)]) == cli.EXIT_LASTING
    assert f"DatasetError: {path}: not the result of `eval --json`" in capsys.readouterr().err
    missing = folder / "missing.json"
    assert cli.main(["report", str(folder), "--teacher-eval", str(missing)]) == cli.EXIT_LASTING
    said = capsys.readouterr().err
    assert f"DatasetError: --teacher-eval {missing}: No such file or directory; " in said
    assert "traceback" not in said


def test_a_reader_that_has_seen_enough_is_no_failure_to_report() -> None:
    command = f"{sys.executable} -m student_trainer.cli settings | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.stdout, done.stderr) == ("## [run]\n", "")


def test_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    for code in (cli.EXIT_FAILED, cli.EXIT_LASTING, cli.EXIT_INTERRUPTED, cli.EXIT_TERMINATED):
        assert re.search(rf"^  {code} ", said, re.MULTILINE)
