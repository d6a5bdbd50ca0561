"""SIGTERM as a request: what is under way is given up, what must be whole is finished first.

Orchestrators send SIGTERM and kill 30 s later. Most of what a trainer does can be given up at any
moment, because nothing that lasts has changed: waiting for rollouts, an evaluation, the gradient of
a step's first update. Three things cannot: the updates of a step from the first to the last, its
record, and a checkpoint. So nothing is interrupted but inside `may_give_up`. Knows no model.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_process.children import kill_engines

EXIT_TERMINATED = 128 + signal.SIGTERM
"""What a shell reports for a process that SIGTERM ended."""
LIMIT_S = 25.0
"""From the signal to the end of the process, unless a checkpoint is still being written."""
MARGIN_S = 1.0


class Stopped(BaseException):
    """Ends what the main thread is doing. No Exception: nobody below the loop catches it."""


class StopRequest:
    """Whether SIGTERM has come, and where it may interrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._may_give_up = False
        self._whole = threading.RLock()
        self._last_words: Callable[[], str] | None = None

    @contextmanager
    def on_sigterm(self, last_words: Callable[[], str]) -> Iterator[None]:
        """SIGTERM is a request within; `last_words` go to stderr, once, when the run ends of it.

        A second SIGTERM ends the process at once: the system does it, whatever Python is in.
        """
        self._last_words = last_words
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._received)
        try:
            yield
        finally:
            if not self.requested:
                signal.signal(signal.SIGTERM, before)

    @contextmanager
    def may_give_up(self) -> Iterator[None]:
        """Within, the request raises Stopped; so does entering once it is there."""
        if self.requested:
            raise Stopped
        outer, self._may_give_up = self._may_give_up, True
        try:
            yield
        except Exception as error:
            # A signal to the whole process group ends the engine too: its end is not the cause.
            if self.requested:
                raise Stopped from error
            raise
        finally:
            self._may_give_up = outer

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, not even the end of the limit interrupts: for writing a checkpoint."""
        with self._whole:
            yield

    def say_last_words(self, *, aloud: bool = True) -> None:
        """Tells whoever sent the signal how to go on; only once. Not `aloud` where another process
        does."""
        with self._whole:
            if self._last_words is not None and aloud:
                sys.stderr.write(f"{self._last_words()}\n")
                sys.stderr.flush()
            self._last_words = None

    def request(self) -> None:
        """Asks the main thread, which calls this, to stop. Raises Stopped where that may be."""
        self.requested = True
        if self._may_give_up:
            raise Stopped

    def _received(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        timer = threading.Timer(LIMIT_S - MARGIN_S, self._out_of_time)
        timer.daemon = True
        timer.start()
        self.request()

    def _out_of_time(self) -> None:
        with self._whole:
            self.say_last_words()
            kill_engines()
            os._exit(EXIT_TERMINATED)
