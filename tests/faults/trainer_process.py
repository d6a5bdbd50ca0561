"""`student-trainer` as a process of its own, for a teacher that knows no tokenizer.

Run as the command would be: python -m tests.faults.trainer_process train --config ... With
TRAINER_SAVES_FOR_S set, saving the student takes that long, and says that it began.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults.training_runs import ROOT, without_a_fingerprint

SAVING = "saving"
"""The file that says so, beside the weights that are being saved."""


@contextmanager
def trainer(arguments: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:  # type: ignore[type-arg]
    """Such a process, which is killed when the block is left before it ended."""
    command = [sys.executable, "-m", "tests.faults.trainer_process", *arguments]
    with started(command, log, **environment) as process:
        yield process


@contextmanager
def started(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:  # type: ignore[type-arg]
    """Any command in the repository's root; what it says goes to the log."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _save_slowly(seconds: float) -> None:
    from student_trainer.learner.learner import Learner

    def save(learner: Learner, folder: Path) -> None:
        (folder / SAVING).touch()
        time.sleep(seconds)

    Learner.save = save  # type: ignore[method-assign]


if __name__ == "__main__":
    from student_trainer import cli

    if slow := os.environ.get("TRAINER_SAVES_FOR_S"):
        _save_slowly(float(slow))
    with without_a_fingerprint():
        sys.exit(cli.main())
