"""The phase a server is in, who is told of it, and what ends it. Knows no engine and no port.

starting -> serving <-> stalled -> draining, or lost from any of them. Health says SERVING in one
phase only. The first SIGTERM or SIGINT drains; a second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import NoReturn

from teacher_server.process import signals

log = logging.getLogger(__name__)

EXIT_OK, EXIT_BROKEN = 0, 1
_SAME_SIGNAL_S = 0.5
"""Wrappers such as timeout(1) deliver one signal twice, to the process and to its group."""


class Phase(Enum):
    """What a server is doing."""

    STARTING = "starting"
    """Loading the model, or testing it."""
    SERVING = "serving"
    STALLED = "stalled"
    """The engine owes answers for too long; calls are still taken, health sends them elsewhere."""
    DRAINING = "draining"
    """Asked to end: answers what it has, takes nothing new."""
    LOST = "lost"
    """Beyond repair: ends with EXIT_BROKEN, so that whoever watches the process starts it anew."""


_FINAL = (Phase.DRAINING, Phase.LOST)


class Lifecycle:
    """One server's phase."""

    def __init__(self, tell: Callable[[bool], None]) -> None:
        """`tell` hears whether the server is ready, at every change."""
        self._tell = tell
        self._phase = Phase.STARTING
        self._signalled_at = 0.0
        self.why_lost = ""
        """One line; empty unless it is beyond repair."""
        self.ending = asyncio.Event()
        """Set once the phase is final."""

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def ready(self) -> bool:
        """Whether clients should come here."""
        return self._phase is Phase.SERVING

    @property
    def accepts(self) -> bool:
        """Whether new work is taken."""
        return self._phase in (Phase.SERVING, Phase.STALLED)

    @property
    def exit_code(self) -> int:
        return EXIT_BROKEN if self._phase is Phase.LOST else EXIT_OK

    def enter(self, phase: Phase) -> None:
        """Changes the phase, unless the present one is final."""
        if self._phase in _FINAL or phase is self._phase:
            return
        log.info("%s, was %s", phase.value, self._phase.value)
        self._phase = phase
        self._tell(self.ready)
        if phase in _FINAL:
            self.ending.set()

    def lose(self, reason: str) -> None:
        """Ends the server as broken."""
        if self._phase not in _FINAL:
            self.enter(Phase.LOST)
            self.why_lost = " ".join(reason.split())
            log.error("beyond repair: %s", self.why_lost)

    def watch_signals(self) -> None:
        """Takes SIGTERM and SIGINT over, for as long as the loop runs."""
        loop = asyncio.get_running_loop()
        signals.take_over(lambda number: loop.call_soon_threadsafe(self._on_signal, number))

    def _on_signal(self, number: int) -> None:
        now = asyncio.get_running_loop().time()
        if self._signalled_at:
            if now - self._signalled_at < _SAME_SIGNAL_S:
                return
            log.warning("second signal %d: ending at once", number)
            leave(128 + number)
        self._signalled_at = now
        log.info("signal %d", number)
        self.enter(Phase.DRAINING)


def leave(exit_code: int) -> NoReturn:
    """Ends the process without waiting for threads, and with it the processes it started."""
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    with suppress(OSError):  # a disk that is full
        sys.stdout.flush()
    os._exit(exit_code)
