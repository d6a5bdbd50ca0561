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


class CoresError(ValueError):
    """Cores that this process may not use; the message names them and what there is."""


def check_cores(cores: str) -> None:
    """Raises CoresError for a core that is not there, or that this process is kept from.

    Linux would pass over it without a word, and the engine's threads would share those that are
    left.
    """
    if cores == AUTO:
        return
    there = os.sched_getaffinity(0)
    if absent := sorted({int(core) for core in cores.split(",")} - there):
        raise CoresError(
            f"names core {', '.join(map(str, absent))}, and this process may use "
            f'{len(there)}: {", ".join(map(str, sorted(there)))}; name those, or "{AUTO}"'
        )


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
