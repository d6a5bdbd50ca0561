"""One teacher and one sampler for the whole study; every run is the product's own loop.

A run gets a fresh student and optimiser, and the sampler the fresh weights. Starting both engines
for every run would cost more than the run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.study.arms import BASE_CONFIG, Arm
from examples.demo import teacher_server
from student_trainer.assembly.run import assembled
from student_trainer.assembly.sampling import RunningSampler, running_sampler
from student_trainer.errors import TrainerError
from student_trainer.recording.json_lines import read_profiles, read_run
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.train import train
from teacher_wire.errors import TeacherError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """Runs arms against engines that stay up."""

    folder: Path
    teacher: str
    running: RunningSampler

    def run(self, arm: Arm, seed: int, *, steps: int) -> dict[str, Any]:
        """Trains one arm with one seed; the record that goes into the results."""
        out = self.folder / arm.name / f"seed{seed}"
        shutil.rmtree(out, ignore_errors=True)
        config = settings(arm, seed, steps=steps, out=out, teacher=self.teacher)
        record: dict[str, Any] = {"seed": seed, "error": None}
        started = time.monotonic()
        try:
            with assembled(config, running=self.running) as run:
                train(run)
        except (TrainerError, TeacherError) as error:
            # A collapse is a result.
            record["error"] = f"{type(error).__name__}: {error}"
        record["elapsed_s"] = round(time.monotonic() - started, 1)
        return record | measured(out)


def settings(arm: Arm, seed: int, *, steps: int, out: Path, teacher: str) -> TrainerConfig:
    """The configuration of one run. Raises ConfigError."""
    overrides = [
        f"run.out={out}",
        f"run.seed={seed}",
        f"run.steps={steps}",
        f"student.model={arm.pair.student}",
        f'teacher.endpoints=["{teacher}"]',
        *arm.overrides,
    ]
    return load_config(BASE_CONFIG, overrides)


def measured(out: Path) -> dict[str, Any]:
    """What a run wrote, as curves: wall seconds and tokens are totals up to each point.

    Wall time is all of a step, by whatever phase; evaluations are in none of them.
    """
    written, profiles = read_run(out), list(read_profiles(out).values())
    rollouts = [step.generation for step in written.steps if step.generation is not None]
    updates = [step.learning for step in written.steps if step.learning is not None]
    accuracies = {evaluation.step: evaluation.accuracy for evaluation in written.evaluations}
    wall_s = _totals(step.seconds.total for step in written.steps)
    generated = _totals(r.generated_tokens for r in rollouts)
    kept = _totals(r.kept_tokens for r in rollouts)
    return {
        "accuracy": accuracies[max(accuracies)],
        "wall_s": round(wall_s[-1], 2),
        "generated_tokens": int(generated[-1]),
        "kept_tokens": int(kept[-1]),
        "curve": [
            {
                "step": step,
                "wall_s": round(wall_s[step], 2),
                "generated_tokens": int(generated[step]),
                "kept_tokens": int(kept[step]),
                "accuracy": accuracy,
            }
            for step, accuracy in sorted(accuracies.items())
        ],
        "max_tokens": [step.max_tokens for step in written.steps],
        "truncated_rollouts": [r.truncated_rollouts for r in rollouts],
        "length_mean": [round(r.length_mean, 1) for r in rollouts],
        "reverse_kl": [round(update.reverse_kl or 0.0, 4) for update in updates],
        "overlap_by_band": {
            "first": profiles[0].overlap_by_band if profiles else None,
            "last": profiles[-1].overlap_by_band if profiles else None,
        },
    }


def _totals(values: Iterable[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))


@contextmanager
def workbench(folder: Path, console: Console) -> Iterator[Workbench]:
    """A teacher server in its own process and a sampler; both are ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(BASE_CONFIG)
    flags = ["--max-context", str(config.rollout.max_context)]
    with (
        teacher_server(folder, console, flags) as teacher,
        running_sampler(config, config.student.model) as running,
    ):
        yield Workbench(folder=folder, teacher=teacher, running=running)
