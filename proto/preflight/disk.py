"""Folders that must be written to, and the room in them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

GB = 1e9
SHM = Path("/dev/shm")


def nearest(path: Path) -> Path:
    """The path itself, or the folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def why_not_writable(folder: Path) -> str | None:
    """Why files cannot be made in a folder that is there or would be made, with the remedy; None
    where they can. A file is made and removed: modes alone do not tell of read-only mounts."""
    place = nearest(folder.absolute())
    if not place.is_dir():
        return f"{place} is a file: choose another folder"
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".driftline-"):
            return None
    except OSError as error:
        who = f"user {os.geteuid()}"
        remedy = (
            "mount the volume writable"
            if os.statvfs(place).f_flag & os.ST_RDONLY
            else f"let {who} write there (chown {os.geteuid()} {place}), or choose another folder"
        )
        return f"{place} cannot be written to by {who}: {error.strerror}: {remedy}"


def free_bytes(folder: Path) -> int:
    """On the disk of a folder that is there or would be made."""
    return shutil.disk_usage(nearest(folder.absolute())).free


def gb(num_bytes: float) -> str:
    """In a unit in which it is not 0.0."""
    return f"{num_bytes / GB:,.1f} GB" if num_bytes >= 0.1 * GB else f"{num_bytes / 1e6:,.1f} MB"
