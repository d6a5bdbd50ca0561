"""Which cores of a CPU a vLLM engine runs on.

"auto" leaves the choice to vLLM; "0" or "2,3" names cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

AUTO = "auto"
CORES_PATTERN = r"^(auto|\d+(,\d+)*)$"
IN_ENGINE_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The model runs in the engine core's own process. vLLM turns "uni" into "mp" on a CPU, because it
cannot set OpenMP's threads there; we set them before the process starts."""


def executor_on(cores: str) -> str | None:
    """vLLM's distributed_executor_backend; None is vLLM's own choice."""
    return None if cores == AUTO else IN_ENGINE_CORE


@contextmanager
def children_on(cores: str) -> Iterator[None]:
    """Processes started within run on these cores only, one thread each; "auto" leaves them be."""
    if cores == AUTO:
        yield
        return
    chosen = {int(core) for core in cores.split(",")}
    before = os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    os.sched_setaffinity(0, chosen)
    os.environ["OMP_NUM_THREADS"] = str(len(chosen))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before[0])
        os.environ.pop("OMP_NUM_THREADS")
        if before[1] is not None:
            os.environ["OMP_NUM_THREADS"] = before[1]
