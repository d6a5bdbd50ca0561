"""The NVIDIA driver and its GPUs, as `nvidia-smi` tells them: without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "nvidia-smi"
LIMIT_S = 20.0
_FIELDS = "index,uuid,name,memory.total,memory.used,driver_version"
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One that this process sees."""

    index: int
    """Of the machine."""
    name: str
    total_bytes: int
    used_bytes: int
    """By whoever is there already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """What there is of NVIDIA."""

    version: str | None
    """None without a driver that answers."""
    gpus: tuple[Gpu, ...] = ()
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order."""
    why_not: str = ""
    """Where there is no driver, what was tried."""
    hidden_by: str | None = None
    """CUDA_VISIBLE_DEVICES, where it is set."""

    @property
    def is_there(self) -> bool:
        """A GPU, whether or not anything is known of it: a container may lack `nvidia-smi`."""
        return bool(self.gpus) or (self.version is None and has_devices())

    @property
    def why_none(self) -> str:
        """Why no GPU is seen."""
        if self.version is None:
            return self.why_not
        if self.hidden_by is not None:
            return f"CUDA_VISIBLE_DEVICES is {self.hidden_by!r}"
        return f"driver {self.version} names none"


def has_devices() -> bool:
    """Whether the kernel's driver has GPUs in here, also where nvidia-smi is not."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def driver(env: Mapping[str, str] | None = None) -> Driver:
    """What `nvidia-smi` says, and the environment hides."""
    env = os.environ if env is None else env
    if (program := shutil.which(PROGRAM, path=env.get("PATH"))) is None:
        return Driver(version=None, why_not=f"there is no {PROGRAM} on PATH")
    command = [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(version=None, why_not=f"{PROGRAM} does not answer: {error}")
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        return Driver(version=None, why_not=f"{PROGRAM} failed: {said}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(_FIELDS.split(","))]
    version = rows[0][5] if rows else "unknown"
    hidden_by = env.get("CUDA_VISIBLE_DEVICES")
    return Driver(version=version, gpus=_visible(rows, hidden_by), hidden_by=hidden_by)


def _visible(rows: list[list[str]], chosen: str | None) -> tuple[Gpu, ...]:
    found = {
        (row[0], row[1]): Gpu(
            index=int(row[0]), name=row[2], total_bytes=_mib(row[3]), used_bytes=_mib(row[4])
        )
        for row in rows
    }
    if chosen is None:
        return tuple(found.values())
    kept: list[Gpu] = []
    for word in (part.strip() for part in chosen.split(",")):
        # As CUDA reads it: the first word that names none ends the list.
        gpu = next((g for (i, uuid), g in found.items() if word == i or _names(word, uuid)), None)
        if gpu is None:
            break
        kept.append(gpu)
    return tuple(kept)


def _names(word: str, uuid: str) -> bool:
    return word.startswith("GPU-") and uuid.startswith(word)


def _mib(text: str) -> int:
    """Bytes; 0 for what the driver does not tell ("[N/A]", of memory that the processor shares)."""
    return int(text) * MIB if text.isdigit() else 0
