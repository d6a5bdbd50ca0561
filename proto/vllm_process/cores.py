"""Which cores of a CPU a vLLM engine runs on.

"auto" leaves the choice to vLLM; "0" or "2,3" names cores, which the engine then has for itself:
its threads spin while they wait for each other. "shared" is all cores, each given away while a
thread waits, so that another engine goes on there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

AUTO, SHARED = "auto", "shared"
CORES_PATTERN = rf"^({AUTO}|{SHARED}|\d+(,\d+)*)$"
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""For GNU's OpenMP, which vLLM's CPU wheel loads with torch, and for LLVM's and Intel's. Spinning,
a thread would keep the core that the one it waits for, or another engine, could use."""
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
    if cores in (AUTO, SHARED):
        return
    there = os.sched_getaffinity(0)
    if absent := sorted({int(core) for core in cores.split(",")} - there):
        raise CoresError(
            f"names core {', '.join(map(str, absent))}, and this process may use "
            f'{len(there)}: {", ".join(map(str, sorted(there)))}; name those, or "{AUTO}"'
        )


def wait_passively(cores: str) -> None:
    """Where an engine shares its cores, this process's threads give theirs away too.

    Only before it loads an OpenMP, with torch: that reads its environment once. What is set
    already stays.
    """
    if cores == SHARED:
        for name, value in PASSIVE.items():
            os.environ.setdefault(name, value)


def executor_on(cores: str) -> str | None:
    """vLLM's distributed_executor_backend; None is vLLM's own choice."""
    return None if cores == AUTO else IN_ENGINE_CORE


@contextmanager
def children_on(cores: str) -> Iterator[None]:
    """Processes started within run on these cores only, a thread each; "auto" leaves them be."""
    if cores == AUTO:
        yield
        return
    mine = os.sched_getaffinity(0)
    chosen = mine if cores == SHARED else {int(core) for core in cores.split(",")}
    told = {"OMP_NUM_THREADS": str(len(chosen))} | (PASSIVE if cores == SHARED else {})
    before = {name: os.environ.get(name) for name in told}
    os.sched_setaffinity(0, chosen)
    os.environ |= told
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
