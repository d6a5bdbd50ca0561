"""Training runs of the playground's student, small enough for a test, and what they learnt from.

The trainer is `student-trainer train` in this process; only the teacher is another one.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from student_trainer import cli
from student_trainer.assembly import teachers
from student_trainer.recording.json_lines import read_lines
from student_trainer.records import Rollout
from student_trainer.rollouts.stream import RolloutStream, Taken
from teacher_wire.vocabulary import Vocabulary
from tests.faults.forked_processes import ForkedTeacher
from tests.waiting import LIMIT_S, eventually

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "examples" / "playground" / "checkpoints"
FAKE = {"fake_vocab_size": 64, "fake_latency_s": 0.01, "max_k": 16}
SHORT = {
    "run.steps": 4,
    "student.model": CHECKPOINTS / "student",
    "data.train": CHECKPOINTS / "train.jsonl",
    "data.heldout": "null",
    "sampler": '{"kind": "hf"}',
    "rollout.prompts_per_step": 2,
    "rollout.rollouts_per_prompt": 2,
    "rollout.chunk_tokens": 8,
    "drift.w_drop": 0.04,
    "budget.max_tokens": 32,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 20,
    "teacher.connect_timeout_s": 1.0,
}


@dataclass(slots=True)
class Run:
    """A training run and everything it was given to learn from."""

    folder: Path
    exit_code: int = -1
    batches: list[Taken] = field(default_factory=list)

    def train(self, address: str, *, resume: bool = False, **settings: Any) -> Run:
        """Runs to the end; `section__key` overrides section.key."""
        arguments = self.arguments(address, **settings)
        with _recorded(self.batches), without_a_fingerprint():
            self.exit_code = cli.main([*arguments, *(["--resume"] if resume else [])])
        return self

    def arguments(self, address: str, **settings: Any) -> list[str]:
        """Of `student-trainer`, for such a run."""
        changes = {name.replace("__", "."): value for name, value in settings.items()}
        values = {**SHORT, "run.out": self.folder, "teacher.endpoints": f'["{address}"]', **changes}
        sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
        return ["train", "--config", str(ROOT / "configs" / "trainer-demo.toml"), *sets]

    @property
    def rollouts(self) -> list[Rollout]:
        """In the order in which they were learnt from."""
        return [rollout for batch in self.batches for rollout in batch.rollouts]

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return [r for r in read_lines(path) if r["kind"] == kind] if path.exists() else []

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """Of the checkpoint after a step."""
        return load_file(self.folder / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


@contextmanager
def _recorded(batches: list[Taken]) -> Iterator[None]:
    take = RolloutStream.take

    def record(stream: RolloutStream, count: int) -> Taken:
        batches.append(take(stream, count))
        return batches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutStream, "take", record)
        yield


@contextmanager
def without_a_fingerprint() -> Iterator[None]:
    """A teacher with a tokenizer takes five seconds to start, which is the import of transformers;
    one without has no tokens to compare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers.Vocabulary, "of", lambda _: Vocabulary())
        yield


@contextmanager
def meanwhile(work: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Does something to the teacher while the block trains; what it raises is raised here."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(LIMIT_S)
    if failures:
        raise failures[0]


async def until_scored(teacher: ForkedTeacher, num_tokens: int) -> None:
    """Returns once a teacher has scored so many tokens more."""
    pattern = re.compile(r"^teacher_tokens_scored_total\S* (\S+)$", re.MULTILINE)

    def scored() -> float:
        return sum(float(value) for value in pattern.findall(teacher.metrics()))

    before = scored()
    await eventually(lambda: scored() >= before + num_tokens)
