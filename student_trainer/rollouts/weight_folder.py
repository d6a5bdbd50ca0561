"""Weights on their way to the sampler through a folder, where one is named: large enough, and never
left.

Its name carries the process, and the process holds
a lock on it as long as it lives: a folder whose lock can be had is of a process that is dead,
killed perhaps, and is swept by the next run. A process id alone would not tell, because containers
that share /dev/shm count processes each for themselves.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from safetensors.torch import save_file

from student_trainer.errors import ConfigError, WeightSyncError
from student_trainer.process.writing import writing_to
from student_trainer.rollouts.weight_buffer import BUFFER_BYTES

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PREFIX = "driftline-weights-"
LOCK_FILE = ".lock"
NOTHING: Mapping[str, str] = MappingProxyType({})
SLACK_BYTES = 1 << 20
"""Beside the weights: the header of their file, and blocks that are not full."""


class OwnFolder:
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


class WeightFolder:
    """Weights on their way as one file of safetensors: as much room again as they take."""

    def __init__(
        self, place: Path, *, file: str = "model.safetensors", beside: Mapping[str, str] = NOTHING
    ) -> None:
        """A folder of this process's own will be in `place`, with the weights as `file` and what
        stands `beside` them, text by the name of its file."""
        self._place = place
        self._file = file
        self._beside = beside
        self._own: OwnFolder | None = None

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        """For weights of so many bytes.

        Removes what dead processes of this user have left there, and says so, before it looks how
        much is free. Raises ConfigError when that is too little.
        """
        self.close()
        place, needed = self._place, num_bytes + SLACK_BYTES
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ConfigError(f"sampler.weights_dir: {place} is no folder that may be written")
        if swept := sweep(place):
            say(f"{swept / 1e9:.1f} GB of weights that killed runs had left in {place} are removed")
        free = shutil.disk_usage(place).free
        if free < needed:
            raise ConfigError(
                f"sampler.weights_dir: {place} has {_mb(free)} free, the weights take "
                f"{_mb(needed)}; give it room, or name no folder: then they need "
                f"{_mb(BUFFER_BYTES)} of memory"
            )
        self._own = OwnFolder(place)
        for name, text in self._beside.items():
            (self._own.path / name).write_text(text, encoding="utf-8")

    async def send(
        self,
        weights: Iterator[tuple[str, Tensor]],
        receive: Callable[[str], Awaitable[T]],
        num_readers: int = 1,
    ) -> T:
        """Calls `receive` with the folder, once they are in it, and returns what it returns. Raises
        WeightSyncError when they cannot be written."""
        if self._own is None:
            raise RuntimeError("no room was made for the weights")
        path = self._own.path
        with writing_to(path, WeightSyncError, remedy="make room there, or name no folder"):
            save_file(dict(weights), path / self._file, metadata={"format": "pt"})
        return await receive(str(path))

    def close(self) -> None:
        """Removes the folder."""
        if self._own is not None:
            self._own.close()
            self._own = None


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
