"""Files that hold secrets: who else may read them, and whether they have changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from teacher_wire.secret_files import is_exposed

log = logging.getLogger(__name__)
Stamp = tuple[tuple[int, int, int] | None, ...]


def stamp_of(paths: Iterable[Path]) -> Stamp:
    """Inode, time and size of each file; None for one that cannot be reached."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            entry = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((entry.st_ino, entry.st_mtime_ns, entry.st_size))
    return tuple(found)


def warn_if_readable_by_others(path: Path) -> None:
    """Warns when every user of the machine may read the file."""
    if is_exposed(path):
        log.warning("%s can be read by every user of this machine: chmod o-r", path)
