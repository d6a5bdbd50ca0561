"""Memory that a vLLM engine's process on a CPU frees and wants again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_KEPT_BYTES = 1 << 30
_VARIABLES = {"MALLOC_MMAP_THRESHOLD_": _KEPT_BYTES, "MALLOC_TRIM_THRESHOLD_": _KEPT_BYTES}


@contextmanager
def children_keep_freed_memory() -> Iterator[None]:
    """Processes started within keep up to a GiB of what they free, unless the environment says.

    glibc gives large pieces back at once and Linux clears each page again when it is next touched:
    a third of the time that new weights take.
    """
    ours = {name: str(size) for name, size in _VARIABLES.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
