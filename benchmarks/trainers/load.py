"""How much of the machine's processors went to others while a run was measured. Linux only.

A step beside which others compute says nothing: with as many threads as cores, every one of them
waits for the one that shares its core. So each step is told how many cores others had.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trainers.memory import tree

TICKS = os.sysconf("SC_CLK_TCK")
IDLE, IOWAIT, FIRST_OF_GUESTS = 3, 4, 8
"""Columns of /proc/stat; the time of guests is in that of users already."""


def busy_s() -> float:
    """Processor seconds of everything since the machine was started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    waited = ticks[IDLE] + ticks[IOWAIT]
    return (sum(ticks[:FIRST_OF_GUESTS]) - waited) / TICKS


def processor_s(pids: Sequence[int]) -> dict[int, float]:
    """Processor seconds of those that are alive, with their children that were waited for."""
    found = {}
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        words = text.rpartition(")")[2].split()
        found[pid] = sum(int(word) for word in words[11:15]) / TICKS
    return found


@dataclass(slots=True)
class Others:
    """Cores that processes other than ours had since it was last asked."""

    at_s: float
    """Monotonic, of the look before."""
    busy: float
    own: float

    @classmethod
    def since(cls, now_s: float) -> Others:
        return cls(now_s, busy_s(), _own_s())

    def cores(self, now_s: float) -> float:
        """From the look before to now; what ended in between and was waited for is ours too."""
        busy, own = busy_s(), _own_s()
        seconds = max(now_s - self.at_s, 1 / TICKS)
        others = max(0.0, (busy - self.busy) - (own - self.own)) / seconds
        self.at_s, self.busy, self.own = now_s, busy, own
        return round(others, 3)


def _own_s() -> float:
    return sum(processor_s(tree(os.getpid())).values())
