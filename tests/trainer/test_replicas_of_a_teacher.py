"""Replicas of the playground's teacher, one with weights that are a little other ones: a trainer
compares them before it begins.

Run: python -m pytest tests/trainer/test_replicas_of_a_teacher.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from student_trainer.assembly import teachers
from student_trainer.records import Prompt
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.config import TrainerConfig, load_config
from teacher_wire.errors import FingerprintMismatchError
from tests.tracked_files import ROOT
from tests.trainer.settings.smallest_config import SMALLEST
from tests.trainer.test_teachers import served

CHECKPOINTS = ROOT / "examples" / "playground" / "checkpoints"
TEACHER, STUDENT = CHECKPOINTS / "teacher", CHECKPOINTS / "student"
NOISE = 0.01
"""Of a weight's own size: what a checkpoint a few updates later may differ by."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(STUDENT)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, trained a little further as it were."""
    folder = tmp_path_factory.mktemp("changed") / "teacher"
    shutil.copytree(TEACHER, folder)
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    moved = {name: w * (1 + NOISE * torch.randn_like(w)) for name, w in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def three(changed: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[str]]:
    """Addresses of two that serve the same, and of one that does not; none tells a digest."""
    with served(TEACHER, TEACHER, changed, tokenizer=tokenizer) as addresses:  # type: ignore[arg-type]
        yield addresses


def configured(folder: Path, *overrides: str) -> TrainerConfig:
    (folder / "trainer.toml").write_text(SMALLEST)
    return load_config(folder / "trainer.toml", [f"student.model={STUDENT}", *overrides])


@contextmanager
def connected(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *overrides: str
) -> Iterator[teachers.Teachers]:
    """As a run connects before its first step."""
    small = ("teacher.k=8", "rollout.max_context=64", "rollout.student_topk=8")
    config = configured(folder, *small, "budget.max_tokens=16", *overrides)
    loop = LoopThread()
    prompt = Prompt(prompt_id="0", text="1+1=", token_ids=np.array([5, 6], np.int32), answer=None)
    try:
        with teachers.connected(config, loop, [prompt], len(tokenizer), tokenizer) as asked:
            yield asked
    finally:
        loop.close()


def test_replicas_that_agree_are_used(
    tmp_path: Path, three: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    same = f'teacher.endpoints=["{three[0]}", "{three[1]}"]'
    with connected(tmp_path, tokenizer, same) as asked:
        assert asked.clients[None].info.dtype == "float32"


def test_a_replica_with_other_weights_is_refused_with_what_to_do(
    tmp_path: Path, three: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    mixed = f'teacher.endpoints=["{three[0]}", "{three[2]}"]'
    with pytest.raises(FingerprintMismatchError, match="replicas disagree") as refused:
        with connected(tmp_path, tokenizer, mixed):
            pass
    assert three[0] in refused.value.message
    assert three[2] in refused.value.message
    assert "max_replica_gap_nats is 0.001" in refused.value.message
    with connected(tmp_path, tokenizer, mixed, "teacher.max_replica_gap_nats=100"):
        pass


def test_the_text_is_long_enough_in_any_vocabulary(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    probe = teachers.replica_probe(configured(tmp_path), tokenizer)
    assert len(probe.token_ids) >= teachers.MIN_PROBE_TOKENS
    assert probe.token_ids.max() < len(tokenizer)
    assert len(set(probe.token_ids.tolist())) > 10
