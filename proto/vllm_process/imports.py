"""Thousands of modules at a start, imported without looking for garbage among them: they stay.

With that vLLM takes a fifth less time to import, in the process that starts an engine and in the
engine's own.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CHILDS_MAIN = "__mp_main__"
"""What a spawned process calls the main module of its parent, which it runs before all else."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected within, in all of this process."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def children_uncollected() -> Iterator[None]:
    """Processes that are spawned within collect nothing until they call `collect_again`.

    They run this module in place of this process's main one, of which they must need nothing.
    """
    main = sys.modules["__main__"]
    before, main.__spec__ = main.__spec__, __spec__
    try:
        yield
    finally:
        main.__spec__ = before


def collect_again() -> None:
    """What has been imported is never looked at. Does nothing except in a process of
    `children_uncollected`."""
    main = sys.modules.get(_CHILDS_MAIN)
    if main is not None and main.__spec__ is not None and main.__spec__.name == __name__:
        gc.freeze()
        gc.enable()


if __name__ == _CHILDS_MAIN:
    from vllm_process.children import end_with_parent

    gc.disable()
    # vLLM runs no plugin in the process that balances several engine cores, and in a core only once
    # it has shaken hands, for which it waits minutes.
    end_with_parent()
