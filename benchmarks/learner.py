"""The learner's head against all logits at once; a whole student with and without checkpointing.

    python -m benchmarks.learner --json PATH
    python -m benchmarks.learner --quick           fewer repeats

head     forward and backward of the language-model head, 49 log-probs a row: naive (all logits), a
         plain loop in two passes, the learner's, and on a GPU liger-kernel's fused cross-entropy
learner  forward and backward of a whole student: plain, with gradient checkpointing, and the same
         batch with a sequence that ends early

Every measurement is a process of its own, warmed up; peaks are above weights and gradients. Linux
only. On a CPU the student is a small one, in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from benchmarks.learner_child import HEADS
from benchmarks.measuring import (
    Measured,
    Run,
    Sample,
    interleave,
    ratio,
    ratio_table,
    table,
    wide_console,
    write,
)
from benchmarks.progress import Progress
from benchmarks.provenance import ROOT

LEARNERS = ("plain", "checkpointing", "padded")
REPEATS, QUICK_REPEATS = 5, 3
CPU_ROWS, GPU_ROWS = 2048, 8192
FIGURES = {"cpu_seconds": ".3f", "extra_gib": ".3f", "positions_per_s": ",.0f"}


def measurement(words: Sequence[str]) -> Run:
    """One child process."""
    return measured_by(["-m", "benchmarks.learner_child", *words])


def measured_by(words: Sequence[str], **environment: str) -> Run:
    """What a command of Python prints as JSON, seconds and other figures."""

    async def run(_: int) -> Sample:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *words),
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])}
            | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        if process.returncode:
            lines = err.decode(errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"exit code {process.returncode}: {lines[-1]}")
        measured = json.loads(out)
        return Sample(seconds=measured.pop("seconds"), figures=measured)

    return run


def runs(arguments: argparse.Namespace) -> dict[str, Run]:
    """Arm -> its run; liger-kernel only where it runs."""
    device = ["--device", arguments.device]
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("rows", "vocab", "hidden")]
    whole = [f"--{name}={getattr(arguments, name)}" for name in ("sequences", "tokens", "shape")]
    heads = [name for name in HEADS if name != "liger" or _has_liger(arguments.device)]
    found = {f"head_{arm}": measurement(["head", "--arm", arm, *sizes, *device]) for arm in heads}
    return found | {
        f"learner_{arm}": measurement(["learner", "--arm", arm, *whole, *device])
        for arm in LEARNERS
    }


def _has_liger(device: str) -> bool:
    return device != "cpu" and find_spec("liger_kernel") is not None


def ratios(arms: Mapping[str, Measured]) -> dict[str, float | None]:
    """Seconds, processor seconds and peaks, one arm over another."""

    def figures(name: str, over: str, under: str) -> float | None:
        if over not in arms or under not in arms:
            return None
        upper, lower = arms[over].figure(name), arms[under].figure(name)
        return None if upper is None or not lower else round(upper / lower, 4)

    ours = "head_driftline"
    cpu, peak, speed = "cpu_seconds", "extra_gib", "positions_per_s"
    return {
        "naive_head_peak_over_driftline": figures(peak, "head_naive", ours),
        "driftline_head_seconds_over_naive": ratio(arms, ours, "head_naive"),
        "driftline_head_cpu_seconds_over_naive": figures(cpu, ours, "head_naive"),
        "driftline_head_seconds_over_two_pass": ratio(arms, ours, "head_two_pass"),
        "driftline_head_cpu_seconds_over_two_pass": figures(cpu, ours, "head_two_pass"),
        "driftline_head_peak_over_two_pass": figures(peak, ours, "head_two_pass"),
        "driftline_head_peak_over_liger": figures(peak, ours, "head_liger"),
        "driftline_head_seconds_over_liger": ratio(arms, ours, "head_liger"),
        "checkpointing_peak_over_plain": figures(peak, "learner_checkpointing", "learner_plain"),
        "checkpointing_speed_over_plain": figures(speed, "learner_checkpointing", "learner_plain"),
        "padded_speed_over_unpadded": figures(speed, "learner_padded", "learner_plain"),
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.learner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "bench-learner.json"
    made.add_argument("--quick", action="store_true", help="fewer repeats")
    made.add_argument("--json", type=Path, default=default, metavar="PATH", help="results")
    made.add_argument("--repeats", type=int, help=f"of each arm ({REPEATS}, quick {QUICK_REPEATS})")
    made.add_argument("--device", help="cpu or cuda; what there is")
    made.add_argument("--rows", type=int, help=f"of the head ({CPU_ROWS}, on a GPU {GPU_ROWS})")
    made.add_argument("--vocab", type=int, default=151_936, help="of the head")
    made.add_argument("--hidden", type=int, default=1024, help="of the head")
    made.add_argument("--shape", help="of the student (small, on a GPU qwen3-1.7b)")
    made.add_argument("--sequences", type=int, help="in its batch (4, on a GPU 1)")
    made.add_argument("--tokens", type=int, help="of each (512, on a GPU 16384)")
    return made


def settle(arguments: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on the device."""
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cpu = arguments.device == "cpu"
    arguments.rows = arguments.rows or (CPU_ROWS if on_cpu else GPU_ROWS)
    arguments.shape = arguments.shape or ("small" if on_cpu else "qwen3-1.7b")
    arguments.sequences = arguments.sequences or (4 if on_cpu else 1)
    arguments.tokens = arguments.tokens or (512 if on_cpu else 16384)
    arguments.repeats = arguments.repeats or (QUICK_REPEATS if arguments.quick else REPEATS)
    return arguments


def main(words: Sequence[str] | None = None, console: Console | None = None) -> int:
    arguments, console = settle(parser().parse_args(words)), console or wide_console()
    names = ("device", "rows", "vocab", "hidden", "shape", "sequences", "tokens", "repeats")
    settings = {name: getattr(arguments, name) for name in names}
    progress = Progress(arguments.json, settings)
    chosen = runs(arguments)
    arms = {name: Measured(description=name.split("_")[0]) for name in chosen}
    progress.restore(arms)
    asyncio.run(
        interleave(
            chosen,
            arms,
            repeats=arguments.repeats,
            pause_s=0.0,
            warm_up=False,  # every process is a new one and warms itself up
            said=lambda line: console.print(line, highlight=False),
            kept=lambda: progress.keep(arms),
        )
    )
    found = ratios(arms)
    for kind, reference in (("head", "head_naive"), ("learner", "learner_plain")):
        some = {name: arm for name, arm in arms.items() if name.startswith(kind)}
        title = f"{kind}, forward and backward, {arguments.device}"
        console.print(table(title, some, reference=reference, figures=FIGURES))
    if "head_liger" not in arms:
        console.print("liger-kernel: not measured, it needs a CUDA device and the package")
    write(arguments.json, arms, found, settings)
    progress.done()
    console.print(ratio_table(found))
    return 1 if any(arm.error for arm in arms.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
