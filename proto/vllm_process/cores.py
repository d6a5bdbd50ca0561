"""Which cores of a CPU a vLLM engine runs on.

"auto" leaves the choice to vLLM; "0" or "2,3" names cores, which the engine then has for itself:
its threads spin while they wait for each other. "shared" is all cores, each given away while a
thread waits, so that another engine goes on there; "shared:1" is one thread on any of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_process.children import engines

AUTO, SHARED = "auto", "shared"
CORES_PATTERN = rf"^({AUTO}|{SHARED}(:[1-9]\d*)?|\d+(,\d+)*)$"
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""For GNU's OpenMP, which vLLM's CPU wheel loads with torch, and for LLVM's and Intel's. Spinning,
a thread would keep the core that the one it waits for, or another engine, could use."""
BRIEF = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Spinning for half a millisecond at most, and a twentieth where several threads of a process have
threads of their own: there GNU's OpenMP, told anything but "active", hardly spins at all, and an
operation of 30 us takes three times as long."""
IN_ENGINE_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The model runs in the engine core's own process. vLLM turns "uni" into "mp" on a CPU, because it
cannot set OpenMP's threads there; we set them before the process starts."""
_set_here: set[str] = set()
"""Of BRIEF's names, those that `wait_briefly` has set."""


class CoresError(ValueError):
    """Cores that this process may not use; the message names them and what there is."""


def check_cores(cores: str) -> None:
    """Raises CoresError for a core that is not there, or that this process is kept from.

    Linux would pass over it without a word, and the engine's threads would share those that are
    left.
    """
    there = os.sched_getaffinity(0)
    if cores == AUTO:
        return
    if cores.startswith(SHARED):
        if (asked := _num_threads(cores)) > len(there):
            raise CoresError(
                f"asks for {asked} threads, and this process may use {len(there)} cores: at most "
                f'"{SHARED}:{len(there)}"'
            )
        return
    if absent := sorted({int(core) for core in cores.split(",")} - there):
        raise CoresError(
            f"names core {', '.join(map(str, absent))}, and this process may use "
            f'{len(there)}: {", ".join(map(str, sorted(there)))}; name those, or "{AUTO}"'
        )


def wait_briefly() -> None:
    """This process's threads give their cores away when they have waited a little for each other.

    Only before it loads an OpenMP, with torch: that reads its environment once. What is set
    already stays. Engines with cores of their own are not told.
    """
    for name in BRIEF.keys() - os.environ.keys():
        os.environ[name] = BRIEF[name]
        _set_here.add(name)


def executor_on(cores: str) -> str | None:
    """vLLM's distributed_executor_backend; None is vLLM's own choice."""
    return None if cores == AUTO else IN_ENGINE_CORE


@contextmanager
def children_on(cores: str) -> Iterator[None]:
    """Processes started within run on these cores only, a thread each; "auto" leaves the choice to
    them. What an engine that was started within has idling takes no core from what computes."""
    mine = os.sched_getaffinity(0)
    is_shared = cores.startswith(SHARED)
    named = None if is_shared or cores == AUTO else {int(core) for core in cores.split(",")}
    told: dict[str, str | None] = dict(PASSIVE) if is_shared else dict.fromkeys(_set_here)
    if cores != AUTO:
        told["OMP_NUM_THREADS"] = str(_num_threads(cores))
    before = {name: os.environ.get(name) for name in told}
    os.sched_setaffinity(0, named or mine)
    _set(told)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
        _set(before)
    _keep_gloo_from_preempting()


def _keep_gloo_from_preempting() -> None:
    """Of an engine core that is alone and has no workers: others have messages in gloo's loops.

    On one device there is a loop for each of its groups, a dozen, that wakes a hundred times a
    second and finds nothing: each time it would push a thread that computes off its core, the
    learner's too, and the others of its parallel region would wait for it. Only on Linux; where
    threads may not be set, nothing changes.
    """
    running = engines()
    if sys.platform != "linux" or len(running) != 1:
        return
    with suppress(OSError):
        for thread in Path(f"/proc/{running[0].pid}/task").iterdir():
            if (thread / "comm").read_text().startswith("gloo_tcp_loop"):
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))


def _num_threads(cores: str) -> int:
    """Of an engine whose cores are not left to it."""
    if cores.startswith(SHARED):
        return int(cores.partition(":")[2] or len(os.sched_getaffinity(0)))
    return len(set(cores.split(",")))


def _set(variables: Mapping[str, str | None]) -> None:
    """None takes one away."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
