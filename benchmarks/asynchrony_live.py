"""What generating ahead is worth where it can be worth anything: a core for generation, another one
for learning, and no step in which either has both.

    python -m benchmarks.asynchrony_live --json PATH

The playground, its stop off. Sampler's engine and teacher have the first core, trainer and learner
the last, a thread each; epochs are chosen so that the two phases take alike. Arms are values of
`rollout.max_staleness`, in turns, every round with another seed; each run's first two steps count
for nothing. The students that come of it are measured as benchmarks.trainers measures them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.measuring import turned, wide_console
from benchmarks.processes import child, ready_file, what_failed
from benchmarks.provenance import ROOT, provenance
from benchmarks.trainer_work import CHECKPOINTS, PLAYGROUND
from benchmarks.trainers.pairs import PAIRS
from benchmarks.trainers.running import OFFLINE, heldout
from student_trainer.process.writing import write_whole

RUNS = ROOT / "runs" / "bench-asynchrony"
STALENESS = (0, 1)
NOT_COUNTED = 2
Steps = list[dict[str, Any]]


def run(staleness: int, seed: int, *, steps: int, epochs: int) -> Steps:
    """The steps of one run; its student is saved. Raises RuntimeError."""
    first, *_, last = sorted(os.sched_getaffinity(0))
    ready = ready_file()
    command = [sys.executable, "-m", "teacher_server.cli", "serve"]
    command += ["--config", str(PLAYGROUND.teacher_config), "--cpu-cores", str(first)]
    command += ["--model", str(CHECKPOINTS / "teacher"), "--ready-file", str(ready)]
    command += ["--grpc-port", "0", "--http-port", "0"]
    with child("asynchrony-teacher", command) as server:
        asyncio.run(server.until(ready.exists))
        endpoint = json.loads(ready.read_text())["grpc_address"]
        ready.unlink()
        settings = PLAYGROUND.step_settings(RUNS / "run", CHECKPOINTS / "student", endpoint, steps)
        settings |= {
            "run.seed": seed,
            "rollout.rollouts_per_prompt": 1,
            "rollout.max_staleness": staleness,
            "drift.stop_in_flight": False,
            "optim.epochs": epochs,
            "sampler.cpu_cores": str(first),
        }
        words = [sys.executable, "-m", "benchmarks.asynchrony_child", str(PLAYGROUND.config)]
        words += [str(last), str(student(staleness, seed))]
        words += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        environment = OFFLINE | {"OMP_NUM_THREADS": "1"}
        with child("asynchrony", words, env=environment, stdout=subprocess.PIPE) as trainer:
            assert trainer.process.stdout is not None
            events = [json.loads(line) for line in trainer.process.stdout]
            if trainer.process.wait() or not events or events[-1]["event"] != "done":
                raise RuntimeError(what_failed(trainer.log))
    return events[:-1]


def student(staleness: int, seed: int) -> Path:
    """Where a run leaves what it has trained."""
    return RUNS / f"staleness{staleness}-{seed}"


def counted(runs: dict[int, Steps]) -> Steps:
    return [step for steps in runs.values() for step in steps[NOT_COUNTED:]]


def table_of(runs: dict[int, dict[int, Steps]], levels: dict[int, dict[int, float]]) -> Table:
    """A row a bound on staleness; the last column is held-out reverse KL by seed."""
    table = Table(title="a core for generation, a core for learning", title_justify="left")
    for name in ("max_staleness", "s a step", "generate", "learn", "sync", "staleness", "KL"):
        table.add_column(name, justify="right")
    for staleness, by_seed in runs.items():
        steps = counted(by_seed)
        figures = [
            median(step[name] for step in steps)
            for name in ("seconds", "generate", "learn", "sync")
        ]
        table.add_row(
            str(staleness),
            *(f"{figure:.2f}" for figure in figures),
            str(max(step["staleness"] for step in steps)),
            " ".join(f"{level:.3f}" for level in levels[staleness].values()),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="seeds")
    parser.add_argument("--steps", type=int, default=12, help="of a run")
    parser.add_argument("--epochs", type=int, default=2, help="of learning in a step")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench-asynchrony-live.json")
    arguments = parser.parse_args()
    console = wide_console()
    runs: dict[int, dict[int, Steps]] = {staleness: {} for staleness in STALENESS}
    for seed in range(arguments.rounds):
        for staleness in turned([*STALENESS], seed):
            steps = run(staleness, seed, steps=arguments.steps, epochs=arguments.epochs)
            runs[staleness][seed] = steps
            seconds = " ".join(f"{step['seconds']:.1f}" for step in steps)
            console.print(f"max_staleness {staleness}, seed {seed}: {seconds} s", highlight=False)
    folders = {student(s, seed): (s, seed) for s in STALENESS for seed in range(arguments.rounds)}
    levels: dict[int, dict[int, float]] = {staleness: {} for staleness in STALENESS}
    for folder, figures in heldout(PAIRS["playground"], [*folders]):
        staleness, seed = folders[folder]
        levels[staleness][seed] = figures["reverse_kl"]
    console.print(table_of(runs, levels))
    medians = [median(step["seconds"] for step in counted(runs[s])) for s in STALENESS]
    console.print(f"steps an hour, {STALENESS[1]} over 0: {medians[0] / medians[1]:.2f}")
    record = {
        "made": provenance(),
        "settings": {name: getattr(arguments, name) for name in ("rounds", "steps", "epochs")},
        "ratios": {"steps_an_hour_depth_1_over_0": round(medians[0] / medians[1], 4)},
        "heldout_reverse_kl": levels,
        "runs": runs,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
