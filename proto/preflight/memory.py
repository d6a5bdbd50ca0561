"""Memory of the machine, and what a container leaves of it."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> float | None:
    """Bytes that this process may still take; None where nothing says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return min(float(found["MemAvailable"]), left_in_control_group())


def total_memory() -> float | None:
    """Bytes that there are, of the machine or the container; None where nothing says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    machine = next(float(x.split()[1]) * 1024 for x in lines if x.startswith("MemTotal:"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return machine
    return machine if limit == "max" else min(machine, float(limit))


def left_in_control_group(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container may still take; infinite without a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        reclaimable = sum(
            int(line.split()[1])
            for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.split()[0] in ("inactive_file", "active_file")
        )
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else float(limit) - used + reclaimable
