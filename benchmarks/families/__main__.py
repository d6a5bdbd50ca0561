"""Measures what is not of this code yet and writes the table: a quarter of an hour.

What was measured is kept as it comes, so that a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.families.arms import ARMS, measured, write_model
from benchmarks.families.document import (
    DOCUMENT,
    RESULTS,
    digest,
    is_current,
    read,
    versions,
    written,
)
from student_trainer.process.writing import write_whole
from tests.trainer.learner.tiny_families import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--anew", action="store_true", help="what is of this code already, too")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console()
    results = read()
    for family in arguments.families:
        for arm in arguments.arms:
            if is_current(results, family, arm) and not arguments.anew:
                continue
            with tempfile.TemporaryDirectory(prefix="driftline-family-") as folder:
                cells = asyncio.run(measured(arm, write_model(Path(folder), family)))
            results["cells"].setdefault(family, {})[arm] = {
                "code": digest(family, arm),
                "versions": versions(),
                "cells": {column: asdict(cell) for column, cell in cells.items()},
            }
            write_whole(RESULTS, json.dumps(results, indent=1) + "\n")
            for column, cell in cells.items():
                console.print(
                    f"{family:<12} {column:<22} {cell.refused or cell.raw or cell.gap_nats}"
                )
    write_whole(DOCUMENT, written(DOCUMENT.read_text(encoding="utf-8"), results))


if __name__ == "__main__":
    main()
