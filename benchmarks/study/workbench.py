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
from student_trainer.assembly.run import RunningSampler, assembled, running_sampler
from student_trainer.errors import TrainerError
from student_trainer.recording.run_log import METRICS_FILE, PROFILES_FILE, read_lines
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.train import train
from teacher_wire.errors import TeacherError

PHASES = ("generate", "teacher_wait", "learn", "sync")
"""What counts as wall time: everything of a step. Evaluations are timed by none of them."""


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
    """What a run wrote, as curves: wall seconds and tokens are totals up to each point."""
    records = read_lines(out / METRICS_FILE)
    steps = [r for r in records if r["kind"] == "step"]
    evals = {r["step"]: r["accuracy"] for r in records if r["kind"] == "eval"}
    profiles = read_lines(out / PROFILES_FILE)
    wall_s = _totals(sum(step[f"seconds_{phase}"] for phase in PHASES) for step in steps)
    generated = _totals(step["generated_tokens"] for step in steps)
    kept = _totals(step["kept_tokens"] for step in steps)
    return {
        "accuracy": evals[max(evals)],
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
            for step, accuracy in sorted(evals.items())
        ],
        "max_tokens": [int(step["max_tokens"]) for step in steps],
        "truncated_rollouts": [int(step["truncated_rollouts"]) for step in steps],
        "length_mean": [round(step["length_mean"], 1) for step in steps],
        "reverse_kl": [round(step.get("reverse_kl", 0.0), 4) for step in steps],
        "overlap_by_band": {
            "first": profiles[0]["overlap_by_band"] if profiles else None,
            "last": profiles[-1]["overlap_by_band"] if profiles else None,
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
