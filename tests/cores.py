"""Which core an engine of this test process runs on."""

from __future__ import annotations

import os


def own_core() -> str:
    """Another one for each of pytest's processes, as far as there are enough."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    cores = sorted(os.sched_getaffinity(0))
    return str(cores[number % len(cores)])
