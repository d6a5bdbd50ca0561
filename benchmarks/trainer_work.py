"""What a trainer is given to do where its steps are measured: one update a step, nothing evaluated,
nothing saved. Which models do it the benchmark says."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT

CHECKPOINTS = ROOT / "examples" / "playground" / "checkpoints"
"""Of the playground's models, and its problems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Configurations of trainer and teacher, and the size of a step."""

    config: Path
    teacher_config: Path
    rollouts: int
    """A step, one a prompt."""
    max_tokens: int
    max_context: int
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of the trainer, on top of its configuration."""

    def step_settings(self, out: Path, student: Path, endpoint: str, steps: int) -> dict[str, Any]:
        """Of a run of the trainer, `changes` left out."""
        return {
            "run.out": str(out),
            "run.steps": steps,
            "student.model": str(student),
            "data.heldout": None,
            "teacher.endpoints": [endpoint],
            "rollout.prompts_per_step": self.rollouts,
            "rollout.max_context": self.max_context,
            "budget.max_tokens": self.max_tokens,
            "optim.epochs": 1,
            "optim.updates_per_epoch": 1,
            "checkpoint.every_steps": steps + 1,
        }

    def as_fields(self) -> dict[str, Any]:
        """For work of a further kind."""
        return {each.name: getattr(self, each.name) for each in fields(Work)}


PLAYGROUND = Work(
    config=ROOT / "configs" / "trainer-demo.toml",
    teacher_config=ROOT / "configs" / "teacher-demo.toml",
    rollouts=64,
    max_tokens=288,
    max_context=320,
)
LANGUAGE = Work(
    config=ROOT / "configs" / "trainer-language.toml",
    teacher_config=ROOT / "configs" / "teacher-language.toml",
    rollouts=16,
    max_tokens=128,
    max_context=384,
    changes={"sampler.max_num_seqs": 16},
)
