"""The folder that weights pass through on their way to the sampler: large enough, and never left.

It is in memory (/dev/shm) where there is room. Its name carries the process, and the process holds
a lock on it as long as it lives: a folder whose lock can be had is of a process that is dead,
killed perhaps, and is swept by the next run. A process id alone would not tell, because containers
that share /dev/shm count processes each for themselves.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from student_trainer.errors import ConfigError, WeightSyncError

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "driftline-weights-"
LOCK_FILE = ".lock"
SLACK_BYTES = 1 << 20
"""Beside the weights: the header of their file, and blocks that are not full."""


class WeightFolder:
    """A folder of this process, removed when it is closed."""

    def __init__(self, parent: Path) -> None:
        """Raises OSError when it cannot be made."""
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}{os.getpid()}-", dir=parent))
        self._lock = (made / LOCK_FILE).open("w", encoding="utf-8")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Only now may it be found: a sweep would take it for one that nobody holds.
        self.path = made.rename(made.with_name(made.name.removeprefix(".")))

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def weight_folder(num_bytes: int, chosen: Path | None, say: Callable[[str], None]) -> WeightFolder:
    """A folder with room for so many bytes; what was not expected of it is said.

    Sweeps what dead processes of this user have left there before it looks how much is free. Raises
    ConfigError when the chosen folder is too small, WeightSyncError when none is large enough.
    """
    needed = num_bytes + SLACK_BYTES
    tried = []
    places = [chosen] if chosen is not None else [SHARED_MEMORY, Path(tempfile.gettempdir())]
    for place in places:
        if not place.is_dir() or not os.access(place, os.W_OK):
            tried.append(f"{place} is no folder that may be written")
            continue
        if swept := sweep(place):
            say(f"{swept / 1e9:.1f} GB of weights that killed runs had left in {place} are removed")
        free = shutil.disk_usage(place).free
        if free >= needed:
            if tried:
                say(f"{tried[0]}: weights go to the sampler through {place}")
            return WeightFolder(place)
        tried.append(f"{place} has {_mb(free)} free, the weights take {_mb(needed)}")
    remedy = "give it room (docker: --shm-size) or name another folder, sampler.weights_dir"
    if chosen is not None:
        raise ConfigError(f"sampler.weights_dir: {tried[0]}; {remedy}")
    raise WeightSyncError(f"{'; '.join(tried)}; {remedy}")


def sweep(place: Path) -> int:
    """Removes the folders there whose processes are dead; returns how many bytes that freed.

    Not those of other users, and none without a lock to tell by.
    """
    freed = 0
    for folder in place.glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with (folder / LOCK_FILE).open("r", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size = sum(path.stat().st_size for path in folder.iterdir())
                shutil.rmtree(folder)
        except OSError:
            continue
        freed += size
    return freed


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
