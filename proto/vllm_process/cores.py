"""Which cores of a CPU a vLLM engine runs on.

"auto" leaves the choice to vLLM; "0" or "2,3" names cores, which the engine then has for itself:
its threads spin while they wait for each other. "shared" is all cores, each given away while a
thread waits, so that another engine goes on there; "shared:1" is one thread on any of them.
An engine of several processes divides them evenly.
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
cannot set OpenMP's threads there; we set them before the process starts. Only for an engine that is
one process."""
_BINDING, _NODES = "VLLM_CPU_OMP_THREADS_BIND", "CPU_VISIBLE_MEMORY_NODES"
"""vLLM's own variables: cores of each process of an engine ("0|1"), and NUMA nodes that it uses."""
_set_here: set[str] = set()
"""Of BRIEF's names, those that `wait_briefly` has set."""


class CoresError(ValueError):
    """Cores that this process may not use; the message names them and what there is."""


def check_cores(cores: str, num_processes: int = 1) -> None:
    """Raises CoresError for a core that is not there, or that this process is kept from, and for
    cores that are not enough for the processes of an engine on a CPU.

    Linux would pass over an absent one without a word, and the engine's threads would share those
    that are left.
    """
    there = os.sched_getaffinity(0)
    if cores == AUTO:
        _check_nodes(num_processes)
    elif cores.startswith(SHARED):
        if (asked := _num_threads(cores)) > len(there):
            raise CoresError(
                f"asks for {asked} threads, and this process may use {len(there)} cores: at most "
                f'"{SHARED}:{len(there)}"'
            )
        if asked < num_processes or (asked % num_processes and cores != SHARED):
            raise CoresError(f"is {_too_few(asked, 'thread', num_processes, len(there))}")
    elif absent := sorted(set(_named(cores)) - there):
        raise CoresError(
            f"names core {', '.join(map(str, absent))}, and this process may use "
            f'{len(there)}: {", ".join(map(str, sorted(there)))}; name those, or "{AUTO}"'
        )
    elif (given := len(_named(cores))) % num_processes:
        raise CoresError(f"names {_too_few(given, 'core', num_processes, len(there))}")


def _too_few(given: int, what: str, num_processes: int, num_there: int) -> str:
    return (
        f"{given} {what}{'s' * (given > 1)} for {num_processes} processes, each with as many of "
        f"its own: a multiple of {num_processes}, and at most {num_there}, or fewer processes"
    )


def _check_nodes(num_processes: int) -> None:
    """vLLM 0.32 stops where it has less than a NUMA node for each process, unless it is told how
    to bind them."""
    if os.environ.get(_BINDING, AUTO) != AUTO or num_processes <= (nodes := _num_nodes()):
        return
    raise CoresError(
        f"leaves {num_processes} processes to vLLM, which gives each a NUMA node of its own, and "
        f'this process may use {nodes}: name {num_processes} cores, or "{SHARED}"'
    )


def _num_nodes() -> int:
    """As vLLM 0.32 counts them; one where Linux does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 1
    listed = status.partition("Mems_allowed_list:")[2].partition("\n")[0].strip()
    allowed = {node for part in listed.split(",") if part for node in _range(part)}
    if visible := os.environ.get(_NODES):
        allowed &= {int(node) for node in visible.split(",") if node.strip().isdigit()}
    return max(1, len(allowed))


def _range(part: str) -> range:
    """Of "3" or "0-2"."""
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def wait_briefly() -> None:
    """This process's threads give their cores away when they have waited a little for each other.

    Only before it loads an OpenMP, with torch: that reads its environment once. What is set
    already stays. Engines with cores of their own are not told.
    """
    for name in BRIEF.keys() - os.environ.keys():
        os.environ[name] = BRIEF[name]
        _set_here.add(name)


def executor_on(cores: str, num_processes: int = 1) -> str | None:
    """vLLM's distributed_executor_backend; None is vLLM's own choice."""
    return None if cores == AUTO or num_processes > 1 else IN_ENGINE_CORE


@contextmanager
def children_on(cores: str, num_processes: int = 1) -> Iterator[None]:
    """Processes started within run on these cores only, a thread each; "auto" leaves the choice to
    them. What an engine that was started within has idling takes no core from what computes."""
    mine = os.sched_getaffinity(0)
    is_shared = cores.startswith(SHARED)
    named = None if is_shared or cores == AUTO else set(_named(cores))
    told: dict[str, str | None] = dict(PASSIVE) if is_shared else dict.fromkeys(_set_here)
    if cores != AUTO:
        told["OMP_NUM_THREADS"] = str(max(1, _num_threads(cores) // num_processes))
    if cores != AUTO and num_processes > 1:
        told[_BINDING] = "nobind" if is_shared else _divided(cores, num_processes)
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
    for thread in Path(f"/proc/{running[0].pid}/task").glob("*"):
        with suppress(OSError):  # of one that has ended meanwhile
            if (thread / "comm").read_text().startswith("gloo_tcp_loop"):
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))


def _num_threads(cores: str) -> int:
    """Of an engine whose cores are not left to it."""
    if cores.startswith(SHARED):
        return int(cores.partition(":")[2] or len(os.sched_getaffinity(0)))
    return len(_named(cores))


def _named(cores: str) -> list[int]:
    """Each once, in their order."""
    return list(dict.fromkeys(int(core) for core in cores.split(",")))


def _divided(cores: str, num_processes: int) -> str:
    """As vLLM writes it: "0,1|2,3"."""
    named = _named(cores)
    each = max(1, len(named) // num_processes)
    return "|".join(
        ",".join(map(str, named[start : start + each])) for start in range(0, len(named), each)
    )


def _set(variables: Mapping[str, str | None]) -> None:
    """None takes one away."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
