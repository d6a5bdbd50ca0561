"""What a server says while it starts, so that a log that stands still is not taken for a hang."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)
EVERY_S = 30.0


@contextmanager
def saying(doing: str, *, every_s: float = EVERY_S) -> Iterator[None]:
    """A line when the block begins, and one every so often while it lasts, from a thread: the block
    may keep the event loop."""
    began, over = time.monotonic(), threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            log.info("still %s, for %.0f s", doing, time.monotonic() - began)

    log.info("%s", doing)
    teller = threading.Thread(target=repeat, name="saying", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
