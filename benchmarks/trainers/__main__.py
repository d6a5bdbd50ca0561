"""TRL's newest distillation trainer and ours, side by side: the same work, an environment each.

python -m benchmarks.trainers --json PATH
python -m benchmarks.trainers --quick                 two steps a run, one round
python -m benchmarks.trainers --pairs smollm2 --arms trl driftline --at-most 1

A round runs every arm of a pair once, each as processes of its own that have the machine to
themselves; every round has another seed and begins with another arm. Then the saved students are
measured on held-out prompts. All is written as it comes, and the same command at the same commit
goes on where it was: `--at-most` ends it after so many runs, `--no-heldout` and `--only-heldout`
part the two.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measuring import ratio_table, table, turned, wide_console
from benchmarks.options import sayer
from benchmarks.processes import first_line
from benchmarks.provenance import ROOT, commit
from benchmarks.trainers import environment, running
from benchmarks.trainers import pairs as lineup
from benchmarks.trainers.pairs import ARMS, PAIRS, Arm, Pair
from benchmarks.trainers.results import BEFORE, PHASES, Results, ratios

QUIET_CORES = 0.1
QUICK_STEPS, QUICK_ROUNDS = 3, 1
SHOWN = (
    {f"{name}_s": ".2f" for name in PHASES},
    {
        "generated_tokens": ",.0f",
        "start_up_s": ".1f",
        "peak_trainer_mib": ",.0f",
        "heldout_reverse_kl": ".4f",
        "others_cores": ".2f",
    },
)
"""Two tables a pair."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.trainers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "bench-trainers.json"
    made.add_argument("--quick", action="store_true", help="three steps, one round")
    made.add_argument("--json", type=Path, default=default, metavar="PATH", help="results")
    made.add_argument("--pairs", nargs="+", choices=PAIRS, default=[*PAIRS])
    made.add_argument("--arms", nargs="+", choices=ARMS, help="only these arms")
    made.add_argument("--rounds", type=int, help="of every arm, default by pair")
    made.add_argument("--steps", type=int, help="of a run, at least 2, default by pair")
    made.add_argument("--at-most", type=int, metavar="N", help="runs; the same command goes on")
    made.add_argument("--again", action="store_true", help="what failed, or ran beside others")
    made.add_argument(
        "--quiet-cores",
        type=float,
        default=QUIET_CORES,
        metavar="CORES",
        help="what others may have of the machine beside a step that counts (default %(default)s)",
    )
    parts = made.add_mutually_exclusive_group()
    parts.add_argument("--no-heldout", action="store_true", help="train only")
    parts.add_argument("--only-heldout", action="store_true", help="measure what was trained")
    for name, folder in environment.DEFAULTS.items():
        made.add_argument(
            f"--{name.replace('_', '-')}-env",
            type=Path,
            default=folder,
            metavar="FOLDER",
            help="environment, made where it is not there",
        )
    return made


def size(arguments: argparse.Namespace, pair: Pair) -> tuple[int, int]:
    """Rounds, and steps of a run."""
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else pair.rounds)
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else pair.steps)
    return int(rounds), max(2, int(steps))


def train(
    arguments: argparse.Namespace, results: Results, settings: dict[str, Any], console: Console
) -> None:
    """Every run that is missing, round by round."""
    said, left = sayer(console), arguments.at_most
    environments = {"trl": arguments.trl_env, "trl_vllm": arguments.trl_vllm_env}
    arms = {arm.name: arm for arm in lineup.chosen(arguments.arms)}
    for pair in (PAIRS[name] for name in arguments.pairs):
        rounds, asked = size(arguments, pair)
        for number in range(rounds):
            for arm in (arms[name] for name in turned([*arms], number)):
                name = f"{pair.name}/{arm.name}"
                if name in results.errors and not arguments.again:
                    continue
                steps = min(asked, arm.steps or asked)
                digest = wanted(pair, arm, number, steps)
                again = arguments.again
                if results.has(name, number, digest, commit(), mostly_quiet=again):
                    continue
                if left == 0:
                    return
                left = left if left is None else left - 1
                said(f"round {number + 1}/{rounds} {name}: {steps} steps")
                try:
                    run = running.run(
                        pair, arm, number, steps=steps, environments=environments, said=said
                    )
                except Exception as error:  # noqa: BLE001 - whatever fails in an arm is its result
                    results.fail(name, first_line(error))
                else:
                    results.add(name, run)
                    seconds = ", ".join(f"{step['seconds']:.1f}" for step in run["steps"])
                    said(f"  {seconds} s; first token after {run['start_up_s']} s")
                if name in results.errors:
                    said(f"  {results.errors[name]}")
                results.write(DESCRIPTIONS, settings)


DESCRIPTIONS = {name: arm.description for name, arm in ARMS.items()}


def wanted(pair: Pair, arm: Arm, number: int, steps: int) -> str:
    """Digest of the work of a run."""
    out = running.RUNS / "unused"
    return lineup.task(pair, arm, seed=number, steps=steps, out=out, teacher="nobody:1").digest()


def measure(
    arguments: argparse.Namespace, results: Results, settings: dict[str, Any], console: Console
) -> None:
    """The held-out figures that are missing, of students that were saved."""
    said = sayer(console)
    for pair in (PAIRS[name] for name in arguments.pairs):
        missing = {
            running.RUNS / pair.name / f"{name.partition('/')[2]}-{run['round']}" / f"step{step}": (
                run.setdefault("heldout", {}),
                str(step),
            )
            for name, runs in results.runs.items()
            for run in runs
            if name.startswith(f"{pair.name}/")
            for step in range(1, len(run["steps"]) + 1)
            if str(step) not in run.get("heldout", {})
        }
        missing = {folder: place for folder, place in missing.items() if folder.is_dir()}
        if pair.name not in results.before:
            missing[pair.student] = (results.before, pair.name)
        if not missing:
            continue
        for folder, figures in running.heldout(pair, [*missing]):
            kept, key = missing[folder]
            kept[key] = figures
            said(f"{pair.name} {folder.parent.name} {folder.name}: {figures['reverse_kl']:.4f}")
            for name, runs in results.runs.items():
                if name.startswith(f"{pair.name}/") and pair.name in results.before:
                    for run in runs:
                        run.setdefault("heldout", {})[BEFORE] = results.before[pair.name]
            results.write(DESCRIPTIONS, settings)


def settings_of(arguments: argparse.Namespace, results: Results) -> dict[str, Any]:
    """What goes into the file: of each of its pairs the shape; no path of this machine."""
    names = ("rollouts", "max_tokens", "max_context", "save_every", "num_heldout")
    found: dict[str, Any] = {"quiet_cores": arguments.quiet_cores}
    there = {*arguments.pairs, *(name.partition("/")[0] for name in results.runs)}
    for pair in (pair for name, pair in PAIRS.items() if name in there):
        rounds, steps = size(arguments, pair)
        shape = {name: getattr(pair, name) for name in names}
        found[pair.name] = {**shape, "rounds": rounds, "steps": steps, "changes": pair.changes}
    return found


def show(results: Results, console: Console) -> None:
    for pair in PAIRS:
        arms = {
            name.partition("/")[2]: arm
            for name, arm in results.measured(DESCRIPTIONS).items()
            if name.startswith(f"{pair}/")
        }
        if arms:
            for figures in SHOWN:
                told = {
                    name: form
                    for name, form in figures.items()
                    if any(arm.figure(name) is not None for arm in arms.values())
                }
                console.print(table(pair, arms, reference=None, figures=told))
    console.print(ratio_table(ratios(results.runs, results.errors)))


def main(words: Sequence[str] | None = None, console: Console | None = None) -> int:
    arguments, console = parser().parse_args(words), console or wide_console()
    for name in arguments.pairs:
        if not PAIRS[name].student.is_dir():
            console.print(f"{name}: its models are not there: {PAIRS[name].missing}")
            return 2
    results = Results(arguments.json, arguments.quiet_cores)
    settings = settings_of(arguments, results)
    if not arguments.only_heldout:
        train(arguments, results, settings, console)
    if not arguments.no_heldout:
        measure(arguments, results, settings, console)
    results.write(DESCRIPTIONS, settings)
    show(results, console)
    return 1 if results.errors else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
