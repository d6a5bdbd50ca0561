"""Runs what is missing of the study, then writes the plots and docs/study.md.

python -m benchmarks.study                       everything, about an hour and a half on two cores
python -m benchmarks.study --arms opd topk_stop  some arms
python -m benchmarks.study --quick --json PATH   a subset in about ten minutes
python -m benchmarks.study --document            only plots and docs/study.md, from the results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.study.arms import ARMS, QUICK, ROOT, Arm, by_name
from benchmarks.study.document import results_table, write_document
from benchmarks.study.plots import write_plots
from benchmarks.study.results import Results

RESULTS = ROOT / "benchmarks" / "results" / "study.json"
STEPS = 12


def main() -> int:
    arguments = _parser().parse_args()
    console = Console()
    try:
        arms = by_name(
            arguments.arms or (list(QUICK) if arguments.quick else [a.name for a in ARMS])
        )
    except ValueError as error:
        console.print(f"[bold red]study:[/] {error}", highlight=False)
        return 2
    quick = arguments.quick
    path = arguments.json or (ROOT / "runs" / "study-quick.json" if quick else RESULTS)
    seeds = range(1 if quick else arguments.seeds)
    results = Results(path)
    todo = [
        (arm, seed)
        for seed in seeds
        for arm in _turned(arms, seed)
        if not results.has(arm, seed, steps=arguments.steps)
    ]
    if todo and not arguments.document:
        _run(todo, results, arguments, console)
    console.print(results_table(results.arms))
    console.print(f"{path}", highlight=False)
    if path == RESULTS:
        for written in (*write_plots(results.arms), write_document(results)):
            console.print(f"{written}", highlight=False)
    return 0


def _turned(arms: list[Arm], seed: int) -> list[Arm]:
    """Every seed begins elsewhere, so that no arm always runs when the machine is at its worst."""
    start = seed * len(arms) // 3 % len(arms)
    return arms[start:] + arms[:start]


def _run(
    todo: list[tuple[Arm, int]],
    results: Results,
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    from transformers.utils import logging

    from benchmarks.study.workbench import workbench

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with workbench(arguments.runs, console) as bench:
        for number, (arm, seed) in enumerate(todo, start=1):
            console.rule(f"{number}/{len(todo)}  {arm.name}, seed {seed}", align="left")
            record = bench.run(arm, seed, steps=arguments.steps)
            results.add(arm, record, steps=arguments.steps)
            ended = record["error"] or f"accuracy {record['accuracy']:.1%}"
            console.print(
                f"{arm.name} seed {seed}: {ended}, {record['generated_tokens']:,} tokens, "
                f"{record['wall_s']:.0f} s of steps, {record['elapsed_s']:.0f} s in all",
                highlight=False,
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--seeds", type=int, default=3, help="seeds an arm (default 3)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a run (default {STEPS})")
    parser.add_argument("--quick", action="store_true", help="a few arms, one seed")
    parser.add_argument("--json", type=Path, help="results file; read, and added to")
    parser.add_argument("--document", action="store_true", help="run nothing, write the document")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "study", help="logs of the runs"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
