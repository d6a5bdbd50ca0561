"""Files that hold a secret in the clear: whether every user of the machine may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def is_exposed(path: Path) -> bool:
    """Every user may read it. Raises OSError for a file that is not there."""
    return bool(path.stat().st_mode & stat.S_IROTH)


def why_refused(path: Path, what: str) -> str | None:
    """Why a file with `what` in the clear is not used, with the remedy; None where it may be.

    On a read-only mount, as a container's secret is, the mode says nothing of who is in there, and
    cannot be changed there. Raises OSError for a file that is not there.
    """
    if not is_exposed(path) or os.statvfs(path).f_flag & os.ST_RDONLY:
        return None
    mode = stat.S_IMODE(path.stat().st_mode)
    return (
        f"{path} holds {what} and has mode {mode:04o}: every user of this machine can read it; "
        f"chmod o-r {path}"
    )
