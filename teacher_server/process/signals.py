"""SIGTERM and SIGINT before there is a server to drain: the process ends with 0, and at once. Of
the other commands Ctrl-C ends the process as a shell knows it, without a traceback.

Set by the command's first line, before anything that takes long to import; a server takes them over
(teacher_server.process.lifecycle). Imports next to nothing: a signal before it has is nobody's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Until they are taken over. On leaving they are as before, unless somebody has."""
    before = {number: signal.signal(number, _end) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _end:
                signal.signal(number, handler)


@contextmanager
def interrupts_end_quietly() -> Iterator[None]:
    """Until left, SIGINT ends the process as it ends one that is not Python's."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, _frame: FrameType | None) -> None:
    # Not by an exception: an import in the middle of its work may swallow it.
    os.write(2, f"teacher-server: signal {number} before it served: ended\n".encode())
    os._exit(0)


def take_over(act: Callable[[int], object]) -> None:
    """From now on `act` is called with the number of each, in the main thread, between two of its
    instructions. Not by the event loop: it would put the defaults back when it closes."""
    for number in ENDING_SIGNALS:
        signal.signal(number, lambda number, _frame: act(number))


def ignore() -> None:
    """The process is ending with the code it has, and a signal changes nothing any more."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
