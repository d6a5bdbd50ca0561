"""The command line that the benchmarks with engines share, and the set-up that follows from it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.arms.base import Setup
from benchmarks.models import SHAPES, checkpoint
from benchmarks.provenance import ROOT

REPEATS, QUICK_REPEATS = 5, 3


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """The flags of every benchmark with engines."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_json = ROOT / "runs" / f"bench-{name}.json"
    made.add_argument("--quick", action="store_true", help="smaller, and fewer repeats")
    made.add_argument("--json", type=Path, default=default_json, metavar="PATH", help="results")
    made.add_argument("--model", choices=SHAPES, default="qwen3-0.6b", help="shape")
    made.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="arithmetic of every arm (few CPUs have bfloat16; without it float32 is far faster)",
    )
    made.add_argument("--arms", nargs="+", metavar="NAME", help="only these arms")
    made.add_argument("--repeats", type=int, help=f"of each arm (default {REPEATS})")
    made.add_argument("--k", type=int, default=32, help="top-k and candidates a row")
    made.add_argument("--cores", help='such as 0,1; "auto" on a GPU (default: all of this CPU)')
    made.add_argument("--kv-cache-gib", type=float, help="of every vLLM engine (default 1)")
    made.add_argument("--max-num-batched-tokens", type=int, default=4096, help="of vLLM engines")
    made.add_argument("--block-size", type=int, default=32, help="of our server")
    made.add_argument(
        "--block-sizes", type=int, nargs="+", help="of vLLM's best setting, an arm each"
    )
    made.add_argument(
        "--vllm-executor",
        choices=("core", "default"),
        default="core",
        help="where the rivals' model runs: in the engine core, as ours, or where vLLM puts it",
    )
    made.add_argument("--eager", action="store_true", help="no arm compiles its model")
    return made


def setup(arguments: argparse.Namespace, *, max_context: int, kv_cache_gib: float = 1.0) -> Setup:
    """What all arms have in common; makes the checkpoint if it is not there."""
    return Setup(
        model=str(checkpoint(arguments.model)),
        vocab_size=SHAPES[arguments.model].vocab,
        dtype=arguments.dtype,
        k=arguments.k,
        max_context=max_context,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_gib=arguments.kv_cache_gib or kv_cache_gib,
        cores=arguments.cores or all_cores(),
        eager=arguments.eager,
        block_size=arguments.block_size,
        vllm_executor=arguments.vllm_executor,
    )


def repeats(arguments: argparse.Namespace) -> int:
    """How often each arm runs."""
    return int(arguments.repeats or (QUICK_REPEATS if arguments.quick else REPEATS))


def block_sizes(arguments: argparse.Namespace) -> list[int]:
    """Of vLLM's best setting."""
    return list(arguments.block_sizes or ([32] if arguments.quick else [32, 64]))


def settings(arguments: argparse.Namespace, common: Setup) -> dict[str, Any]:
    """What goes into the result file; no path of this machine."""
    names = [name for name in Setup.__dataclass_fields__ if name != "model"]
    return {"model": arguments.model} | {name: getattr(common, name) for name in names}


def sayer(console: Console) -> Callable[[str], None]:
    """Prints a line as it is."""
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def all_cores() -> str:
    """Of this CPU; "auto" where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return "auto"
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
