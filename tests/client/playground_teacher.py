"""The playground's teacher on one thread, for tests that ask it over the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples/playground/checkpoints/teacher"


def main(arguments: Sequence[str]) -> int:
    """`teacher-server serve` with the transformers engine."""
    # Two threads wait for each other, and beside other processes they wait long.
    os.environ["OMP_NUM_THREADS"] = "1"
    from teacher_server import cli

    flags = ["--engine", "hf", "--model", str(CHECKPOINT), "--max-context", "1024"]
    return int(cli.main(["serve", *flags, "--no-self-test", *arguments]) or 0)
