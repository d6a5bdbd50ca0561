"""What is refused before a model is loaded. Run: pytest tests/teacher/process/test_loading.py"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import Qwen3Config

from teacher_server.engine.checkpoint import num_positions
from teacher_server.metrics.server import Metrics
from teacher_server.process import loading
from teacher_server.process.model_folder import check_model_folder
from teacher_server.process.waiting import saying
from teacher_server.settings import ConfigError, TeacherConfig
from tests.waiting import wait_until

ENGINES = ("hf", "vllm")


def config_of(model: Path | str, engine: str = "hf", **values: Any) -> TeacherConfig:
    return TeacherConfig(engine=engine, model=str(model), **values)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A configuration with 2,048 positions, and no weights."""
    config = Qwen3Config(vocab_size=64, max_position_embeddings=2048, dtype="float32")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("engine", ENGINES)
def test_more_context_than_the_model_has_positions_is_refused(model: Path, engine: str) -> None:
    with pytest.raises(ConfigError, match=r"max_context is 2049, and the model .* has 2048 posit"):
        loading.build_engine(config_of(model, engine, max_context=2049))
    assert loading.build_engine(config_of(model, engine, max_context=2048)).info.max_context == 2048


@pytest.mark.parametrize("engine", ENGINES)
def test_where_nobody_chose_a_context_it_is_no_more_than_the_models(
    model: Path, engine: str
) -> None:
    assert TeacherConfig(engine="fake").max_context > 2048
    assert loading.build_engine(config_of(model, engine)).info.max_context == 2048


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 2048),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, 8192),
    ],
)
def test_positions_are_scaled_as_the_configuration_says(
    rope: dict[str, Any], positions: int
) -> None:
    config = Qwen3Config(max_position_embeddings=2048, rope_parameters=rope)
    assert num_positions(config) == positions


def test_cuda_without_cuda_is_refused_with_what_to_do(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Was an AssertionError of torch's, as a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is 'cuda', and torch finds no CUDA device here"):
        loading.build_engine(config_of(model, device="cuda"))


def test_a_wrong_path_is_found_without_an_import_of_a_model_library(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, why in {
        f"{tmp_path}/no-model": "there is no such folder",
        "./no-model": "there is no such folder",
        "a/b/c": "there is no such folder",
        f"{tmp_path}/file": "that is a file",
        f"{tmp_path}/empty": "the folder has no config.json",
    }.items():
        with pytest.raises(ConfigError, match=why) as caught:
            check_model_folder(config_of(name))
        assert f"cannot read the checkpoint {name!r}" in str(caught.value)


def test_a_checkpoint_and_what_may_be_a_name_on_a_hub_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    for name in (tmp_path, "Qwen/Qwen3-4B", "gpt2", "no/no-such"):
        check_model_folder(config_of(name))
    check_model_folder(TeacherConfig(engine="fake", model="./nowhere"))


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the cache of a hub that is away, at two commits."""
    cache = tmp_path / "hub" / "models--someone--small"
    for ref, commit in COMMITS.items():
        snapshot = cache / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_bytes((model / "config.json").read_bytes())
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "someone/small"


def test_replicas_at_different_commits_of_a_hub_model_are_told_apart(hub_model: str) -> None:
    """Neither had a digest, and both had the revision that nobody had set: an empty one."""
    infos = []
    for revision, commit in (("", COMMITS["main"]), ("v2", COMMITS["v2"])):
        pinned = loading.pinned_to_commit(config_of(hub_model, revision=revision))
        assert pinned.revision == commit
        assert loading.pinned_to_commit(pinned).revision == commit
        infos.append(loading.describe(pinned, loading.build_engine(pinned), None))
    assert [info.weights_digest for info in infos] == ["", ""]
    # What the client's endpoints compare where there is no digest.
    assert [(info.model_id, info.revision) for info in infos] == [
        (hub_model, commit) for commit in COMMITS.values()
    ]
    shown = []
    for info in infos:
        metrics = Metrics()
        metrics.serving(info)
        families = {family.name: family for family in metrics.registry.collect()}
        (sample,) = families["teacher_build_info"].samples
        shown.append(sample.labels["weights"])
    assert shown == [*COMMITS.values()]


def test_a_folder_and_a_fake_have_no_commit(model: Path) -> None:
    for config in (config_of(model), TeacherConfig(engine="fake")):
        assert loading.pinned_to_commit(config) is config


def test_a_log_says_what_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """Minutes of a large checkpoint had no line."""
    with caplog.at_level("INFO"), saying("loading the engine", every_s=0.01):
        wait_until(lambda: "still loading the engine, for 0 s" in caplog.text)
    assert caplog.messages[0] == "loading the engine"


def test_a_session_that_ends_after_its_engine_is_nobodys_error(model: Path) -> None:
    """A drained server's last lines were a traceback: the engine's thread takes no work."""
    engine = loading.build_engine(config_of(model))
    asyncio.run(engine.close())
    engine.forget("s")
