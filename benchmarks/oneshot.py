"""How long does it take to score whole sequences after the fact, 1, 8 and 64 at once?

python -m benchmarks.oneshot --json PATH            all arms, Qwen3-0.6B's shape
python -m benchmarks.oneshot --quick                batches of 1 and 8, three repeats
python -m benchmarks.oneshot --arms driftline vllm_openai floor --batches 8

Every sequence is a prompt, a quarter of it and not scored, and a response whose rows are asked for
at once. All requests of a batch are sent together. The floor is one bare prefill a sequence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from rich.console import Console

from benchmarks import options
from benchmarks.arms.base import Job
from benchmarks.arms.lineup import compared, names, rivals
from benchmarks.measuring import Measured, fastest, ratio, ratio_table, table, wide_console, write
from benchmarks.processes import run
from benchmarks.progress import Progress

BATCHES, QUICK_BATCHES = [1, 8, 64], [1, 8]
LENGTH, LARGE_BATCH_LENGTH = 1024, 256
LARGE_BATCH = 64
"""From here on sequences are shorter, or a single run would take minutes on two cores."""


async def main(arguments: argparse.Namespace, console: Console) -> int:
    batches = arguments.batches or (QUICK_BATCHES if arguments.quick else BATCHES)
    lengths = {batch: _length(arguments, batch) for batch in batches}
    common = options.setup(arguments, max_context=max(lengths.values()) + 64)
    chosen = arguments.arms or names(options.block_sizes(arguments))
    jobs = {f"_b{batch}": _job(batch, length) for batch, length in lengths.items()}
    settings = options.settings(arguments, common)
    settings["tokens_per_sequence"] = {str(batch): length for batch, length in lengths.items()}
    progress = Progress(arguments.json, settings)
    found = await compared(
        chosen,
        common,
        jobs,
        repeats=options.repeats(arguments),
        said=options.sayer(console),
        progress=progress,
    )
    ratios: dict[str, float | None] = {}
    for batch, length in lengths.items():
        cells = [f"{name}_b{batch}" for name in chosen]
        ratios |= named_ratios(found, chosen, batch)
        console.print(
            table(
                f"{batch} x {length} tokens at once, {arguments.model}",
                {cell: found[cell] for cell in cells},
                reference=f"driftline_b{batch}",
                figures={"rows_per_s": ",.0f"},
            )
        )
    write(arguments.json, found, ratios, settings)
    progress.done()
    console.print(ratio_table(ratios))
    console.print(str(arguments.json), highlight=False)
    return 0


def _length(arguments: argparse.Namespace, batch: int) -> int:
    usual = LARGE_BATCH_LENGTH if batch >= LARGE_BATCH else LENGTH
    return int(arguments.length or usual)


def _job(batch: int, length: int) -> Job:
    response = length - length // 4
    return Job(seed=0, prompt=length // 4, response=response, piece=response, texts=batch)


def named_ratios(
    found: Mapping[str, Measured], chosen: list[str], batch: int
) -> dict[str, float | None]:
    """Every arm over ours, ours over the floor, and vLLM's fastest way over ours, for one batch."""
    ours = f"driftline_b{batch}"
    ratios = {
        f"{name}_over_driftline_b{batch}": ratio(found, f"{name}_b{batch}", ours)
        for name in chosen
        if name not in ("driftline", "floor")
    }
    best = fastest(found, [f"{name}_b{batch}" for name in rivals(chosen)])
    best_ratio = None if best is None else ratio(found, best, ours)
    ratios[f"vllm_best_over_driftline_b{batch}"] = best_ratio
    ratios[f"driftline_over_floor_b{batch}"] = ratio(found, ours, f"floor_b{batch}")
    return ratios


def parser() -> argparse.ArgumentParser:
    flags = options.parser("oneshot", __doc__ or "")
    flags.add_argument("--batches", type=int, nargs="+", help="sequences at once")
    flags.add_argument("--length", type=int, help="tokens a sequence, for every batch")
    return flags


if __name__ == "__main__":
    sys.exit(run(main(parser().parse_args(), wide_console())))
