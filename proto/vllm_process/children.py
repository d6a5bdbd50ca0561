"""Processes of a vLLM engine that end with the one that started them: not of the wire, but teacher
and trainer share it.

vLLM's engine core outlives a process that was killed, and keeps its memory: the next one finds the
device full. Linux can end a child with its parent, if the child asks for it. The plugin runs in
every process of vLLM, so it asks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "DRIFTLINE_ENGINE_PARENT"
_PR_SET_PDEATHSIG = 1


@contextmanager
def children_end_with_us() -> Iterator[None]:
    """vLLM's processes started within are killed when this process ends, however it ends.

    Strictly it is the thread that starts them which they do not outlive: a thread of asyncio's
    executor, which lasts as long as its loop.
    """
    os.environ[_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def end_with_parent() -> None:
    """Does nothing except in a child of `children_end_with_us`, and nothing but on Linux."""
    if sys.platform == "linux" and os.environ.get(_VARIABLE) == str(os.getppid()):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
