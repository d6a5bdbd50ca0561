"""How long until a teacher has judged a response every 64 tokens while it grows?

python -m benchmarks.verdict --json PATH            all arms, Qwen3-0.6B's shape
python -m benchmarks.verdict --quick                shorter, three repeats
python -m benchmarks.verdict --arms driftline floor --model tiny

A prompt that is not scored, then a response in pieces; the next piece is sent when the rows of the
one before are there. An arm's time is that of all verdicts together. The floor is one bare prefill
of the whole text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from rich.console import Console

from benchmarks import options
from benchmarks.arms.base import Job
from benchmarks.arms.lineup import CLIENTS, compared, names, rivals
from benchmarks.measuring import Measured, fastest, ratio, ratio_table, table, wide_console, write
from benchmarks.processes import run
from benchmarks.progress import Progress

PROMPT, PIECE = 256, 64
PREFIX, QUICK_PREFIX = 1024, 512
FIGURES = {"rows_per_s": ",.0f", "bytes_per_row": ",.0f"}


async def main(arguments: argparse.Namespace, console: Console) -> int:
    prefix = arguments.prefix or (QUICK_PREFIX if arguments.quick else PREFIX)
    common = options.setup(arguments, max_context=prefix + 64)
    chosen = arguments.arms or [*names(options.block_sizes(arguments)), *CLIENTS]
    job = Job(
        seed=0,
        prompt=arguments.prompt,
        response=prefix - arguments.prompt,
        piece=arguments.piece,
    )
    settings = options.settings(arguments, common)
    settings |= {"prompt": arguments.prompt, "prefix": prefix, "piece": arguments.piece}
    progress = Progress(arguments.json, settings)
    found = await compared(
        chosen,
        common,
        {"": job},
        repeats=options.repeats(arguments),
        said=options.sayer(console),
        progress=progress,
    )
    ratios = named_ratios(found)
    write(arguments.json, found, ratios, settings)
    progress.done()
    title = f"verdicts every {arguments.piece} tokens up to {prefix}, {arguments.model}"
    console.print(table(title, found, reference="driftline", figures=FIGURES))
    console.print(ratio_table(ratios))
    console.print(str(arguments.json), highlight=False)
    return 0


def named_ratios(found: Mapping[str, Measured]) -> dict[str, float | None]:
    """Every arm over ours, ours over the floor, vLLM's fastest way over ours, and TRL's client
    against vLLM over the same against us."""
    ratios = {
        f"{name}_over_driftline": ratio(found, name, "driftline")
        for name in found
        if name not in ("driftline", "floor")
    }
    best = fastest(found, rivals(list(found)))
    ratios["vllm_best_over_driftline"] = None if best is None else ratio(found, best, "driftline")
    ratios["driftline_over_floor"] = ratio(found, "driftline", "floor")
    if "trl_client" in found:
        ratios["trl_client_vllm_over_trl_client"] = ratio(found, "trl_client_vllm", "trl_client")
    return ratios


def parser() -> argparse.ArgumentParser:
    flags = options.parser("verdict", __doc__ or "")
    flags.add_argument("--prompt", type=int, default=PROMPT, help="tokens, not scored")
    flags.add_argument("--prefix", type=int, help="prompt and response in the end, tokens")
    flags.add_argument("--piece", type=int, default=PIECE, help="tokens between two verdicts")
    return flags


if __name__ == "__main__":
    sys.exit(run(main(parser().parse_args(), wide_console())))
