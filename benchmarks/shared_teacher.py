"""Two trainers on one teacher at once: is everything answered, and do they learn as they do alone?

    python -m benchmarks.shared_teacher --json PATH
    python -m benchmarks.shared_teacher --quick        two small steps, once

The playground's pair, the batched transformers sampler, one teacher server. A trainer a seed, each
alone, then all at once; arms are in turns. A run alone is not the same twice: the clock decides
which rows are computed together. So what counts is how far the means of a seed's held-out figures
are apart, beside the spread of all runs alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.measuring import (
    Measured,
    Sample,
    interleave,
    ratio_table,
    table,
    wide_console,
    write,
)
from benchmarks.processes import child, run, what_failed
from benchmarks.progress import Progress
from benchmarks.provenance import ROOT
from examples.demo import READY_FILE, TRAINER_CONFIG, teacher_server
from student_trainer.recording.json_lines import read_lines

RUNS = ROOT / "runs" / "bench-shared-teacher"
SEEDS = (1, 2)
STEPS, REPEATS = 8, 3
SETTINGS: dict[str, Any] = {
    "sampler": '{"kind":"hf_batched"}',
    "rollout.prompts_per_step": 32,
    "eval.num_prompts": 96,
    "eval.teacher_samples": 1,
    "eval.pass_k": 0,
    "eval.every_steps": 1000,
    "trackers.report_to": "[]",
}
QUICK = {"rollout.prompts_per_step": 4, "eval.num_prompts": 4, "budget.max_tokens": 32}
TOGETHER = "together"


def _alone(seed: int) -> str:
    return f"alone_seed{seed}"


SEEDS_OF: dict[str, Sequence[int]] = {**{_alone(seed): (seed,) for seed in SEEDS}, TOGETHER: SEEDS}
"""Of each arm."""
HELDOUT = ("heldout_reverse_kl", "heldout_reverse_kl_se", "accuracy")
SHOWN = {"answered": ",.0f", "failed": ".0f", "steps": ".0f"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The server: where trainers reach it, and where it says what it has done."""

    grpc_address: str
    http_address: str

    def counts(self) -> Counter[str]:
        """What became of queries so far, and errors told to clients."""
        with urllib.request.urlopen(f"http://{self.http_address}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "teacher_admission_total":
                    found[sample.labels["outcome"]] += int(sample.value)
                elif sample.name == "teacher_errors_total":
                    found["errors"] += int(sample.value)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every trainer does."""

    folder: Path
    steps: int
    settings: Mapping[str, Any]

    def command(self, name: str, seed: int, teacher: Teacher) -> list[str]:
        """Of a run in a folder of its own, which is its name at the teacher too."""
        values = {
            "run.out": self.folder / name,
            "run.seed": seed,
            "run.steps": self.steps,
            "teacher.endpoints": f'["{teacher.grpc_address}"]',
            **self.settings,
        }
        words = ["-m", "student_trainer.cli", "train", "--config", str(TRAINER_CONFIG)]
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        return [sys.executable, *words, *sets]


async def trained(work: Work, arm: str, seeds: Sequence[int], teacher: Teacher) -> Sample:
    """Trainers that are started at once, to the end of the last. Raises RuntimeError where one
    fails."""
    before, began = teacher.counts(), time.monotonic()
    names = [f"{arm}-of-seed{seed}" for seed in seeds]
    pairs = zip(names, seeds, strict=True)
    ended = await asyncio.gather(
        *(_ended(work.folder / name, work.command(name, seed, teacher)) for name, seed in pairs),
        return_exceptions=True,
    )
    seconds = time.monotonic() - began
    if failed := [error for error in ended if error is not None]:
        raise failed[0]
    counts = teacher.counts() - before
    figures: dict[str, float] = {
        "answered": counts["admitted"],
        "failed": sum(counts[name] for name in ("refused", "expired", "cancelled", "errors")),
    }
    found = [outcome(work.folder / name) for name in names]
    figures["steps"] = sum(each["steps"] for each in found)
    for seed, each in zip(seeds, found, strict=True):
        figures |= {f"{name}_seed{seed}": value for name, value in each.items()}
    return Sample(seconds=seconds, figures=figures)


async def _ended(folder: Path, command: Sequence[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with child(f"shared-teacher-{folder.name}", command) as made:
        code = await asyncio.to_thread(made.process.wait)
        if code:
            raise RuntimeError(f"{folder.name}: {what_failed(made.log)} (exit code {code})")


def outcome(folder: Path) -> dict[str, float]:
    """What a finished run has written down."""
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    first, *_, last = (line for line in lines if line["kind"] == "eval")
    seconds = [
        sum(value for name, value in step.items() if name.startswith("seconds_")) for step in steps
    ]
    return {
        "steps": len(steps),
        "unscored": sum(step["unscored_rollouts"] for step in steps) + last["heldout_unscored"],
        "step_s": median(seconds),
        "heldout_reverse_kl_before": first["heldout_reverse_kl"],
        **{name: last[name] for name in HELDOUT},
    }


def comparison(arms: Mapping[str, Measured], seeds: Sequence[int]) -> dict[str, float | None]:
    """How far the held-out figures of a seed move beside others, the spread of all runs alone, and
    what being together costs; None where an arm failed."""
    failed = any(arm.error or not arm.samples for arm in arms.values())
    found: dict[str, float | None] = {}
    for name in ("heldout_reverse_kl", "accuracy"):
        alone = {seed: _values(arms[_alone(seed)], f"{name}_seed{seed}") for seed in seeds}
        every = [value for values in alone.values() for value in values]
        found[f"{name}_spread_alone"] = None if failed else max(every) - min(every)
        for seed in seeds:
            beside = _values(arms[TOGETHER], f"{name}_seed{seed}")
            gap = None if failed else abs(mean(beside) - mean(alone[seed]))
            found[f"{name}_gap_seed{seed}"] = gap
    one_by_one = [arms[_alone(seed)].median_s for seed in seeds]
    together = arms[TOGETHER].median_s
    known = [seconds for seconds in one_by_one if seconds is not None]
    found["seconds_together_over_one_by_one"] = (
        None if failed or together is None else together / sum(known)
    )
    return found


def _values(arm: Measured, figure: str) -> list[float]:
    return [sample.figures[figure] for sample in arm.samples]


async def main(arguments: argparse.Namespace, console: Console) -> int:
    quick = arguments.quick
    steps, repeats = arguments.steps or (2 if quick else STEPS), 1 if quick else arguments.repeats
    work = Work(folder=RUNS, steps=steps, settings=SETTINGS | (QUICK if quick else {}))
    settings = {"steps": steps, "repeats": repeats, "seeds": SEEDS, "trainer": work.settings}
    arms = {arm: Measured(description=f"seeds {seeds} at once") for arm, seeds in SEEDS_OF.items()}
    progress = Progress(arguments.json, settings)
    progress.restore(arms)
    RUNS.mkdir(parents=True, exist_ok=True)
    with teacher_server(RUNS, console) as address:
        ready = json.loads((RUNS / READY_FILE).read_text())
        teacher = Teacher(grpc_address=address, http_address=ready["http_address"])

        def run_of(arm: str, seeds: Sequence[int]) -> Any:
            return lambda repeat: trained(work, f"{arm}-{repeat}", seeds, teacher)

        await interleave(
            {arm: run_of(arm, seeds) for arm, seeds in SEEDS_OF.items()},
            arms,
            repeats=repeats,
            warm_up=False,  # every run is a start of its own
            said=lambda line: console.print(line, highlight=False),
            kept=lambda: progress.keep(arms),
        )
    found = comparison(arms, SEEDS)
    write(arguments.json, arms, found, settings)
    progress.done()
    title = f"trainers on one teacher, {steps} steps each"
    console.print(table(title, arms, reference=None, figures=SHOWN))
    console.print(ratio_table(found))
    return 1 if any(arm.error for arm in arms.values()) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "bench-shared-teacher.json"
    made.add_argument("--quick", action="store_true", help="two small steps, once")
    made.add_argument("--json", type=Path, default=default, metavar="PATH", help="results")
    made.add_argument("--steps", type=int, help=f"of each trainer (default {STEPS}, quick 2)")
    made.add_argument("--repeats", type=int, default=REPEATS, help=f"of each arm ({REPEATS})")
    return made


if __name__ == "__main__":
    sys.exit(run(main(parser().parse_args(), wide_console())))
