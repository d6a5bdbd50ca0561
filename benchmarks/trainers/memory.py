"""Peak of the summed proportional set size of some process trees, polled. Linux only.

A page that n processes share counts 1/n in each, so the sum counts it once. What lies in /dev/shm
and is mapped by nobody is in no process; how much /dev/shm grew is told beside it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

EVERY_S = 1.0
"""A look walks the page tables of every process: tens of milliseconds for gigabytes."""
MIB = 2**20
SHARED = Path("/dev/shm")


def tree(root: int) -> list[int]:
    """A process and all below it that are alive."""
    found, unseen = [], [root]
    while unseen:
        pid = unseen.pop()
        found.append(pid)
        try:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                unseen += [int(child) for child in children.read_text().split()]
        except OSError:
            continue
    return found


def proportional_bytes(pids: list[int]) -> int:
    """Sum over those that are alive."""
    total = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue
        for line in rollup.splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def shared_bytes() -> int:
    """What /dev/shm holds."""
    if not SHARED.is_dir():
        return 0
    found = os.statvfs(SHARED)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


class Peaks:
    """Looks at process trees until its block is left."""

    def __init__(self, roots: Mapping[str, int]) -> None:
        """By name, the process at the root of each."""
        self._roots = dict(roots)
        self._peaks = dict.fromkeys(roots, 0)
        self._shared_before = shared_bytes()
        self._shared_peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def mib(self) -> dict[str, float]:
        """The peak of each, and of what was added to /dev/shm."""
        peaks = {name: round(peak / MIB, 1) for name, peak in self._peaks.items()}
        return peaks | {"shared": round(self._shared_peak / MIB, 1)}

    def _look_on(self) -> None:
        while True:
            self._look()
            if self._ended.wait(EVERY_S):
                return

    def _look(self) -> None:
        for name, root in self._roots.items():
            self._peaks[name] = max(self._peaks[name], proportional_bytes(tree(root)))
        self._shared_peak = max(self._shared_peak, shared_bytes() - self._shared_before)
