"""`student-trainer` as one of several processes, one of which gets SIGTERM in the gradient of a
step, while the others do not.

As the command, started by torchrun: -m tests.faults.asked_in_learning train --config ... The
environment says with which of the learner's passes.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from student_trainer import cli

PASS = "TRAINER_ASKED_AT_PASS"
ASKED_RANK = 1


def _ask_at(number: int) -> None:
    from student_trainer.learner.batch import Batch

    forward, count = Batch.forward, 0

    def asked(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            signal.raise_signal(signal.SIGTERM)
        return forward(*arguments, **named)

    Batch.forward = asked  # type: ignore[method-assign]


if __name__ == "__main__":
    if int(os.environ["RANK"]) == ASKED_RANK:
        _ask_at(int(os.environ[PASS]))
    sys.exit(cli.main())
