"""Processor time of processes and threads over time, as Linux counts it. Linux only.

The scheduler counts, in nanoseconds, how long a thread ran and how long it could have run and no
core was free. Between two looks both are taken to go on evenly.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ran:
    """Of one thread since it began."""

    ran_s: float
    waited_s: float
    """For a core."""
    core: int
    """Where it ran last."""


@dataclass(slots=True)
class Look:
    """Every thread at one time."""

    at: float
    """Seconds of the monotonic clock, which all processes share."""
    threads: dict[tuple[int, int], Ran]
    """By process and thread."""


@dataclass(slots=True)
class Clocks:
    """Looks at processes again and again, from a thread of its own."""

    roots: Mapping[str, int]
    """Name -> process; those that it starts are looked at too."""
    looks: list[Look] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    """Process -> whose it is."""

    def look(self) -> None:
        """Once."""
        threads: dict[tuple[int, int], Ran] = {}
        for name, root in self.roots.items():
            for process in _with_children(root):
                self.names.setdefault(process, name if process == root else _named(name, process))
                threads |= {(process, thread): ran for thread, ran in _threads(process)}
        self.looks.append(Look(time.monotonic(), threads))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Looks at them until the block ends."""
        ended = threading.Event()

        def go_on() -> None:
            while not ended.wait(INTERVAL_S):
                self.look()

        self.look()
        watcher = threading.Thread(target=go_on, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            self.look()

    def spent(
        self, start: float, end: float, key: Callable[[int, int, Ran], str]
    ) -> dict[str, tuple[float, float]]:
        """Seconds run and waited for a core between two times, by what `key` makes of a thread."""
        found: dict[str, tuple[float, float]] = {}
        times = [look.at for look in self.looks]
        first, last = max(1, bisect_left(times, start)), bisect_left(times, end)
        for before, after in pairwise(self.looks[first - 1 : last + 1]):
            inside = min(end, after.at) - max(start, before.at)
            share = max(0.0, inside) / max(after.at - before.at, 1e-9)
            for (process, thread), now in after.threads.items():
                then = before.threads.get((process, thread), Ran(0.0, 0.0, now.core))
                ran, waited = found.get(name := key(process, thread, now), (0.0, 0.0))
                found[name] = (
                    ran + share * (now.ran_s - then.ran_s),
                    waited + share * (now.waited_s - then.waited_s),
                )
        return found


def _threads(process: int) -> Iterator[tuple[int, Ran]]:
    folder = Path(f"/proc/{process}/task")
    try:
        threads = [int(entry) for entry in os.listdir(folder)]
    except OSError:
        return
    for thread in threads:
        try:
            ran, waited, _ = (folder / str(thread) / "schedstat").read_text().split()
            stat = (folder / str(thread) / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue  # it has just ended
        yield thread, Ran(int(ran) / 1e9, int(waited) / 1e9, int(stat[36]))


def _with_children(root: int) -> list[int]:
    """A process and what it started, and what that started."""
    found = [root]
    for process in found:
        try:
            tasks = os.listdir(f"/proc/{process}/task")
        except OSError:
            continue
        for task in tasks:
            try:
                children = Path(f"/proc/{process}/task/{task}/children").read_text().split()
            except OSError:
                continue
            found += [int(child) for child in children]
    return found


def _named(owner: str, process: int) -> str:
    try:
        command = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        command = ""
    return f"{owner}'s engine" if "EngineCore" in command else f"{owner}'s other processes"
