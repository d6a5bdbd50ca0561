"""Processes of a vLLM engine that end with the one that started them.

vLLM's engine core outlives a process that was killed, and keeps its memory: the next one finds the
device full. Linux can end a child with its parent, if the child asks for it. Each process asks
twice, first of all (imports.py) and in the plugin: the engine core ends with us, and its workers,
where it has any, with it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from vllm_process.imports import children_uncollected

_VARIABLE = "DRIFTLINE_ENGINE_PARENT"
_SPAWNED = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
"""vLLM does so by itself on a CPU alone. A process that is forked has the locks of gRPC's threads,
and runs no plugin: that was run where it came from."""
_EXACT = {"TRITON_F32_DEFAULT": "ieee"}
"""Triton's products of float32 are of TF32 unless it is told, ten bits of 23, and so is vLLM's
attention in float32 on a GPU."""
_PR_SET_PDEATHSIG = 1
_SHARED_BY_WORKERS = re.compile(r"/dev/shm/vllm_dist_\S+-cpushm_\d+$", re.MULTILINE)


@contextmanager
def children_end_with_us() -> Iterator[None]:
    """vLLM's processes started within are killed when this process ends, however it ends.

    Strictly it is the thread that starts them which they do not outlive: a thread of asyncio's
    executor, which lasts as long as its loop. They are spawned, import without collecting, and
    multiply float32 as what it is, unless the operator has told Triton otherwise.
    """
    told = {_VARIABLE: str(os.getpid()), **_SPAWNED, **(_EXACT | _of_environment(_EXACT))}
    before = _of_environment(told)
    os.environ.update(told)
    try:
        with children_uncollected():
            yield
    finally:
        for name in told.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
    _unname_shared_memory()


def _of_environment(names: Iterable[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def engines() -> list[BaseProcess]:
    """The engine cores of this process, one that is starting too."""
    return [child for child in multiprocessing.active_children() if _is_engine(child)]


def has_engines() -> bool:
    """Whether there is one."""
    return bool(engines())


def kill_engines() -> None:
    """Ends at once the engine cores that this process has, one that is starting too.

    For the end of a process, and for a start that is given up.
    """
    for engine in engines():
        engine.kill()


def _unname_shared_memory() -> None:
    """That by which the workers of an engine on a CPU add up and gather: each has it by now, and
    vLLM 0.32 would leave 4 MiB a thread in /dev/shm when they end, for good."""
    for core in engines():
        for children in Path(f"/proc/{core.pid}/task").glob("*/children"):
            with suppress(OSError):
                for worker in children.read_text().split():
                    maps = Path("/proc", worker, "maps").read_text()
                    for name in set(_SHARED_BY_WORKERS.findall(maps)):
                        Path(name).unlink(missing_ok=True)


def _is_engine(child: BaseProcess) -> bool:
    return child.name.startswith("EngineCore")


def end_with_parent() -> None:
    """Does nothing except in a process of `children_end_with_us`, or one that such a process
    starts, and nothing but on Linux.

    Ends this process where the one that started it has ended before it could ask for that.
    """
    parent = os.environ.get(_VARIABLE)
    if sys.platform != "linux" or parent is None:
        return
    if parent == str(os.getppid()):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # To those that it starts in turn, this is the one to end with.
        os.environ[_VARIABLE] = str(os.getpid())
    if not _lives(parent):
        os._exit(1)


def _lives(pid: str) -> bool:
    """Whether a process is there, and not only waiting for somebody to ask how it ended."""
    try:
        os.kill(int(pid), 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's, or /proc does not tell
    return state not in "ZX"
