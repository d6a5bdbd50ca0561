"""The processes that vLLM starts under another one, seen from outside."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[Path]:
    """/proc folders of a process's children."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    pids = [child for task in tasks for child in (task / "children").read_text().split()]
    return [Path("/proc", child) for child in pids]


def descendants(pid: int) -> list[Path]:
    """/proc folders of its children, theirs, and so on; of those that are still there."""
    found = []
    for child in children(pid):
        found.append(child)
        with suppress(FileNotFoundError):
            found += descendants(int(child.name))
    return found


def is_gone(process: Path) -> bool:
    """Whether one of them has ended, asked for or not."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def engines(pid: int) -> list[Path]:
    """Those of them that are vLLM's engine cores, or on the way to be."""
    return [child for child in children(pid) if _is_engine(child)]


def _is_engine(process: Path) -> bool:
    try:
        command = (process / "cmdline").read_text()
    except FileNotFoundError:
        return False  # ended meanwhile
    return "EngineCore" in command or "spawn_main" in command
