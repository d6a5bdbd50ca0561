"""Checkpoints with broken, missing or half a file: both doctors tell, and `serve` and `train`
refuse by the same check. Run: pytest tests/doctor/test_checkpoint_files.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preflight.checkpoints import (
    CheckpointFileError,
    check_stored,
    check_tokenizer_files,
    is_at_hand,
    model_json,
)
from preflight.findings import Finding
from student_trainer.assembly import early
from student_trainer.errors import CheckpointError
from student_trainer.process.failures import exit_code
from teacher_server.process import doctor, start_checks
from teacher_server.settings import ConfigError, TeacherConfig

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples/playground/checkpoints/teacher"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _longer(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def _emptied(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def _pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n"
    (folder / "model.safetensors").write_text(text)


def _shard_missing(folder: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / names["a"])
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def _no_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": ["a"]}')


def _config(text: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_bytes(text)

    return write


def _config_with(**values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**about, **values}))

    return write


BROKEN = [
    (_truncated, r"model\.safetensors has [\d,]+ bytes, and its header speaks of [\d,]+: "),
    (_longer, r"model\.safetensors has [\d,]+ bytes, and its header speaks of [\d,]+: "),
    (_emptied, r"model\.safetensors has 0 bytes, and ends within its header"),
    (_no_header, r"model\.safetensors has a header that is none"),
    (_pointer, r"model\.safetensors is a pointer of Git LFS: fetch it with `git lfs pull`"),
    (_shard_missing, rf"model-00002-of-00002\.safetensors is not there, and {INDEX} names it"),
    (_no_index, rf"{INDEX} has no weight_map of file names"),
    (_config(b"{"), r"config\.json is no JSON: .*line 1"),
    (_config(b'{"a": "\xff"}'), r"config\.json is not UTF-8: .* at byte 7"),
    (_config(b"[]"), r"config\.json holds a JSON list, must be an object"),
    (_config_with(hidden_size="big"), r"hidden_size of .*config\.json is 'big', must be a number"),
    (_config_with(text_config="x"), r"text_config of .*config\.json is 'x', must be an object"),
]


@pytest.mark.parametrize(("harm", "told"), BROKEN)
def test_a_broken_file_is_named_once_and_refused_at_the_start(
    copied: Path, harm: Callable[[Path], None], told: str
) -> None:
    check_stored(str(copied))
    harm(copied)
    with pytest.raises(CheckpointFileError, match=told) as caught:
        check_stored(str(copied))
    config = TeacherConfig(engine="hf", model=str(copied), grpc_port=0, http_port=0)
    with pytest.raises(ConfigError, match=told) as refused:
        start_checks.refuse_early(config)
    said = f"cannot read the checkpoint '{copied}': {caught.value}"
    assert str(refused.value) == said
    found = examined(config, "model", "memory")
    assert [one.seen for one in found if one.level == "problem"] == [said]


@pytest.mark.parametrize("harm", [_truncated, _shard_missing, _config(b"[]")])
def test_train_refuses_a_broken_student_for_good(
    copied: Path, harm: Callable[[Path], None]
) -> None:
    trainer: Any = SimpleNamespace(student=SimpleNamespace(model=str(copied)))
    early.check_student_files(trainer)
    harm(copied)
    with pytest.raises(CheckpointError, match=rf"^student\.model is '{copied}': ") as caught:
        early.check_student_files(trainer)
    assert exit_code(caught.value) == 2


def test_a_folder_without_a_tokenizer_is_refused(copied: Path) -> None:
    check_tokenizer_files(str(copied))
    check_tokenizer_files("nobody/nothing-of-the-kind")
    (copied / "tokenizer.json").unlink()
    config = TeacherConfig(engine="hf", model=str(copied), grpc_port=0, http_port=0)
    told = rf"^{copied} has no tokenizer's file \(tokenizer\.json, .*or name it by `tokenizer`$"
    with pytest.raises(ConfigError, match=told) as refused:
        start_checks.refuse_early(config)
    (found,) = examined(config, "tokenizer")
    assert (found.level, found.seen) == ("problem", str(refused.value))
    start_checks.refuse_early(config.model_copy(update={"tokenizer": str(CHECKPOINT)}))
    trainer: Any = SimpleNamespace(student=SimpleNamespace(model=str(copied)))
    with pytest.raises(CheckpointError, match="has no tokenizer's file"):
        early.check_student_files(trainer)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with one model, as the hub's library lays it out; the model's folder."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    commit = "0" * 40
    repository = cache / "models--org--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(CHECKPOINT, repository / "snapshots" / commit))


def test_a_cache_that_cannot_be_written_does_where_it_holds_the_model(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "why_not_writable", lambda folder: f"{folder} is read-only")
    config = TeacherConfig(engine="hf", model="org/small", grpc_port=0, http_port=0)
    assert is_at_hand("org/small")
    (found,) = examined(config, "files")
    assert (found.level, "org/small is in " in found.seen) == ("ok", True)
    (cached / "model.safetensors").unlink()
    assert not is_at_hand("org/small")
    assert model_json("org/small") is not None
    check_stored("org/small")  # what the cache lacks is fetched
    (found,) = examined(config, "files")
    assert found.level == "problem"
    assert "is read-only, or set HF_HOME" in found.seen


def test_half_a_file_in_a_cache_is_told(cached: Path) -> None:
    _truncated(cached)
    with pytest.raises(CheckpointFileError, match="its header speaks of"):
        check_stored("org/small")


@pytest.mark.parametrize("name", ["/nosuch/dir", "a b", "../there"])
def test_what_is_no_name_on_a_hub_is_not_to_be_fetched_from_one(name: str) -> None:
    config = TeacherConfig(engine="hf", model=name, grpc_port=0, http_port=0)
    found = examined(config, "files", "model")
    assert [one.level for one in found] == ["problem"]
    assert "it is no name on a hub" in found[0].seen
    assert not any("hf download" in one.remedy for one in found)


def examined(config: TeacherConfig, *checks: str) -> list[Finding]:
    """What these checks of the teacher's doctor find."""
    by_name = dict(doctor._Doctor(config).checks())
    kept = [(name, by_name[name]) for name in checks]
    return [*doctor.made(kept, doctor.REFUSALS)]
