"""What a run of either trainer is asked to do, and the lines in which it says what it did.

Standard library only: TRL's interpreter, which has nothing of ours installed, imports it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Tell = Callable[..., None]
"""Writes a line: the kind of event, and its values by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A run: steps of one rollout a prompt, each of one update or a few."""

    pair: str
    arm: str
    seed: int
    student: str
    """Folder of the checkpoint; the teacher's likewise."""
    teacher: str
    prompts: list[list[str]]
    """Of every step, as text that the tokenizer turns into `prompt_ids` and nothing more."""
    prompt_ids: list[list[list[int]]]
    max_tokens: int
    """Of a response."""
    max_context: int
    """Of prompt and response."""
    temperature: float
    """Of sampling; student and teacher are compared at it."""
    updates: int
    """A step."""
    learning_rates: list[float]
    """Of every update."""
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    save_at: list[int]
    """Steps after which the student is saved."""
    out: str
    """Folder of what the run leaves; a student in a folder called by its step."""
    overrides: list[str]
    """Of the trainer's settings; ours alone reads them."""
    config: str
    """Configuration that they override."""

    @property
    def steps(self) -> int:
        return len(self.prompts)

    @property
    def rollouts(self) -> int:
        """A step."""
        return len(self.prompts[0])

    @property
    def dtype(self) -> str:
        """Of weights and arithmetic, in both trainers."""
        return "float32"

    def saved(self, step: int) -> Path:
        """Where the student after so many steps is, if it was to be saved."""
        return Path(self.out) / f"step{step}"

    def digest(self) -> str:
        """The same for the same work, wherever it is done."""
        content = asdict(self)
        for name in ("out", "student", "teacher"):
            content.pop(name)
        content["overrides"] = [line for line in self.overrides if not _names_a_place(line)]
        return _digest(content)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Task:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content | {"betas": tuple(content["betas"])})


def _names_a_place(override: str) -> bool:
    return override.startswith(("run.out=", "teacher.endpoints=", "student.model="))


def prompts_digest(prompt_ids: Sequence[Sequence[int]]) -> str:
    """Of a step's prompts, whatever their order."""
    return _digest(sorted([int(token_id) for token_id in ids] for ids in prompt_ids))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def phases_apart(clocks: Mapping[str, float], seconds: float) -> dict[str, float]:
    """TRL's phases without overlap, of clocks that lie inside each other.

    The whole of its training_step is `inside`; in it are `generate` and `loss`, in `loss` is
    `teacher`, and what is left is the backward pass. A step is that, the `update` and the rest.
    """
    generate, loss, teacher = clocks["generate"], clocks["loss"], clocks["teacher"]
    return {
        "generate": generate,
        "teacher": teacher,
        "loss": loss - teacher,
        "backward": clocks["inside"] - generate - loss,
        "update": clocks["update"],
        "other": seconds - clocks["inside"] - clocks["update"],
    }


@contextmanager
def telling() -> Iterator[Tell]:
    """Lines go to the standard output of before; what libraries print there, to standard error."""
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)

        def tell(event: str, **values: Any) -> None:
            content = {"event": event, "at": time.monotonic(), **values}
            print(json.dumps(content), file=lines, flush=True)

        yield tell
