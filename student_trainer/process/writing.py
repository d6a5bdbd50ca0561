"""What the disk says to those who write much, as an error of ours: path, cause and remedy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from student_trainer.errors import TrainerError, one_line


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one go; its folder is there."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def writing_to(path: Path, kind: type[TrainerError], *, remedy: str) -> Iterator[None]:
    """What goes wrong in writing below `path` becomes `kind`.

    The libraries that write weights and states turn the system's errors into others of their own,
    without its number: so the space that is left is told with them.
    """
    try:
        yield
    except TrainerError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)
        unwritten = kind(f"{path}: cannot be written ({_space(path)}): {reason}; {remedy}")
        unwritten.may_pass = True
        raise unwritten from error


def _space(path: Path) -> str:
    for folder in (path, *path.parents):
        try:
            return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
        except OSError:
            continue
    return "no such disk"
