"""What recording rollouts costs a step, and how large they are.

    python -m benchmarks.recording                        # the playground, all rollouts or none
    python -m benchmarks.recording --size-of runs/a       # bytes a token of what a run recorded

Steps with all rollouts recorded and without any take turns within one run, so that both have the
same students, prompts and machine. Besides the ratio of their medians, which differs from run to
run by more than what is sought, there is what the recording really took: processor time of its
thread, and time of the loop for choosing, noting weights and handing over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import ROOT, provenance
from rollout_records.reading import steps
from rollout_records.schema import BY_NAME, Shape
from vllm_process.cores import wait_briefly

PAIRS, QUICK_PAIRS = 12, 3
WARM_UP = 2
"""Steps before the first pair."""
CONFIG = ROOT / "configs" / "trainer-demo.toml"
SETTINGS = (
    "data.heldout=null",
    "eval={}",
    "checkpoint.every_minutes=null",
    "trackers.report_to=[]",
)


def main() -> int:
    """Runs the benchmark; prints tables and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, help=f"of steps (default {PAIRS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} pairs")
    parser.add_argument("--size-of", type=Path, metavar="RUN", help="only the size of its rollouts")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench-recording.json")
    arguments = parser.parse_args()
    console = Console(width=110)
    result: dict[str, Any] = {}
    if arguments.json.is_file():
        result = json.loads(arguments.json.read_text())
    if arguments.size_of:
        result["size"] = {"made": provenance()} | sizes(arguments.size_of / "rollouts")
        console.print(size_table(result["size"]))
    else:
        pairs = arguments.pairs or (QUICK_PAIRS if arguments.quick else PAIRS)
        result["cost"] = {"made": provenance()} | cost(pairs, console)
        console.print(cost_table(result["cost"]))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def sizes(folder: Path) -> dict[str, Any]:
    """Bytes a response token: of whole files, and of each column in them."""
    num_bytes = num_tokens = num_rollouts = 0
    by_column: dict[str, int] = {}
    widths: dict[str, int] = {}
    for path in (path for paths in steps(folder).values() for path in paths):
        num_bytes += path.stat().st_size
        with pq.ParquetFile(path) as file:
            num_tokens += sum(file.read(columns=["num_tokens"]).column(0).to_pylist())
            num_rollouts += file.metadata.num_rows
            widths |= _widths(file)
            for group in range(file.num_row_groups):
                for number in range(file.metadata.num_columns):
                    column = file.metadata.row_group(group).column(number)
                    name = column.path_in_schema.partition(".")[0]
                    by_column[name] = by_column.get(name, 0) + column.total_compressed_size
    return {
        "rollouts": num_rollouts,
        "tokens": num_tokens,
        "widths": widths,
        "bytes": num_bytes,
        "bytes_per_token": round(num_bytes / num_tokens, 2),
        "by_column": {
            name: round(size / num_tokens, 3)
            for name, size in sorted(by_column.items(), key=lambda item: -item[1])
        },
    }


def _widths(file: pq.ParquetFile) -> dict[str, int]:
    """Entries a token of the lists, by the first rollout."""
    names = [n for n, column in BY_NAME.items() if column.shape is Shape.LISTS and "ids" in n]
    row = file.read(columns=names).slice(0, 1).to_pylist()[0]
    return {name: len(row[name][0]) for name in names if row[name]}


def cost(pairs: int, console: Console) -> dict[str, Any]:
    """Steps of a run on the playground, recorded whole and not at all in turns."""
    from examples.demo import address_once_ready, starting_teacher

    wait_briefly()
    out = ROOT / "runs" / "bench-recording"
    out.mkdir(parents=True, exist_ok=True)
    with starting_teacher(out) as teacher:
        return _steps(address_once_ready(teacher, console), out, pairs)


def _steps(address: str, out: Path, pairs: int) -> dict[str, Any]:
    from student_trainer.assembly.run import assembled
    from student_trainer.settings.config import load_config
    from student_trainer.train import take_step

    overrides = [
        *SETTINGS, f"run.out={out / 'run'}", f'teacher.endpoints=["{address}"]',
        f"run.steps={2 * pairs + WARM_UP}",
        "recording.rollouts_per_step=all",
    ]  # fmt: skip
    arms: dict[str, list[float]] = {"all": [], "none": []}
    tokens: dict[str, list[int]] = {"all": [], "none": []}
    with assembled(load_config(CONFIG, overrides), overwrite=True) as run, measured() as spent:
        recording = run.rollout_files
        silent = replace(run, rollout_files=_Nothing())  # type: ignore[arg-type]
        for step in range(2 * pairs + WARM_UP):
            # all none | none all | ...: neither always follows the other.
            arm = "all" if (step + 1) // 2 % 2 == 0 else "none"
            began = time.monotonic()
            report = take_step(run if arm == "all" else silent, step)
            seconds = time.monotonic() - began
            run.stream.settle()
            run.state.step = report.step
            if step >= WARM_UP:
                assert report.generation is not None
                arms[arm].append(seconds)
                tokens[arm].append(report.generation.kept_tokens)
            else:
                spent.clear()
        recording.close()
        recorded = sum(tokens["all"])
    per_step = {part: sum(values) / len(arms["all"]) for part, values in spent.items()}
    step_s = median(arms["none"])
    return {
        "seconds": {arm: [round(s, 3) for s in values] for arm, values in arms.items()},
        "tokens": tokens,
        "median_s": {arm: round(median(values), 4) for arm, values in arms.items()},
        "all_over_none": round(median(arms["all"]) / step_s, 4),
        "all_over_none_a_token": round(
            _a_token(arms, tokens, "all") / _a_token(arms, tokens, "none"), 4
        ),
        "recording_s_per_step": {part: round(value, 5) for part, value in per_step.items()},
        "share_of_a_step": {part: round(value / step_s, 5) for part, value in per_step.items()},
        "size": {"recorded_tokens": recorded} | sizes(out / "run" / "rollouts"),
    }


def _a_token(arms: Mapping[str, list[float]], tokens: Mapping[str, list[int]], arm: str) -> float:
    return sum(arms[arm]) / sum(tokens[arm])


class _Nothing:
    """In place of the recording."""

    def chosen(self, rollouts: Sequence[Any]) -> dict[int, Any]:
        return {}


@contextlib.contextmanager
def measured() -> Iterator[dict[str, list[float]]]:
    """Seconds of every call: of the loop for noting and handing over, of processors in the
    thread."""
    from student_trainer.learner.token_weights import TokenWeights
    from student_trainer.recording.rollout_files import RolloutFiles

    spent: dict[str, list[float]] = {}
    timed = (
        (TokenWeights, "note", "loop", time.monotonic),
        (TokenWeights, "by_number", "loop", time.monotonic),
        (RolloutFiles, "chosen", "loop", time.monotonic),
        (RolloutFiles, "write", "loop", time.monotonic),
        (RolloutFiles, "_write", "thread", time.thread_time),
    )
    before = [(owner, name, owner.__dict__[name]) for owner, name, _, _ in timed]

    def wrapped(function: Any, part: str, clock: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            began = clock()
            try:
                return function(*arguments, **options)
            finally:
                spent.setdefault(part, []).append(clock() - began)

        return call

    for owner, name, part, clock in timed:
        setattr(owner, name, wrapped(owner.__dict__[name], part, clock))
    try:
        yield spent
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def cost_table(found: Mapping[str, Any]) -> Table:
    """Medians, ratios and what the recording took."""
    table = Table(title="recording all rollouts, playground", title_justify="left", pad_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for arm, seconds in found["median_s"].items():
        table.add_row(f"step, {arm} recorded, median s", f"{seconds:.3f}")
    table.add_row("all / none", f"{found['all_over_none']:.3f}")
    table.add_row("all / none, a token", f"{found['all_over_none_a_token']:.3f}")
    for part, share in found["share_of_a_step"].items():
        seconds = found["recording_s_per_step"][part]
        table.add_row(f"{part}, of a step", f"{seconds * 1000:.1f} ms, {share:.2%}")
    table.add_row("bytes a token", f"{found['size']['bytes_per_token']:.1f}")
    return table


def size_table(found: Mapping[str, Any]) -> Table:
    """Bytes a token by column."""
    title = f"{found['rollouts']} rollouts, {found['tokens']} tokens"
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("column")
    table.add_column("bytes a token", justify="right")
    table.add_row("whole files", f"{found['bytes_per_token']:.2f}")
    for name, size in found["by_column"].items():
        if size >= 0.05:
            table.add_row(name, f"{size:.2f}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
