"""docker/requirements-{cpu,cuda}.txt: every distribution of the images in its version.

Resolved anew from pyproject.toml and proto/pyproject.toml by uv: `make image-requirements`.

They hold on Linux for every Python that the project allows. torch is named without the variant that
its index gives it (2.13.0, not 2.13.0+cpu), so that it may come from any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from scripts.setup_venv import BREAKS_TRANSFORMERS, uv_environment

EXTRAS = ("cpu", "cuda")
ALSO = ("lora", "otel")
"""Extras that the images have beside one of those: a read-only image cannot be added to."""
UNUSED = {"cpu": frozenset({"triton"}), "cuda": frozenset()}
"""What is required and used by nothing here: xgrammar's triton is for GPUs, 1 GB."""
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
HEADER = "# Made by `make image-requirements`: what the images install, and nothing else."
ROOT = Path(__file__).resolve().parents[1]


def target(extra: str) -> Path:
    """The file of an extra."""
    return ROOT / "docker" / f"requirements-{extra}.txt"


def resolve(extra: str) -> str:
    """uv's universal resolution of both distributions. Raises CalledProcessError."""
    python = sys.executable
    environment = uv_environment([python, "-m", "pip"], os.environ)
    words = [str(Path(python).with_name("uv")), "pip", "compile", "--quiet", "--universal"]
    words += ["--python-version", PYTHONS[0], "--no-header", "--no-annotate"]
    words += ["--no-emit-package", "driftline-client"]
    words += [word for name in (extra, *ALSO) for word in ("--extra", name)]
    words += ["pyproject.toml", "proto/pyproject.toml"]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE
    )
    return done.stdout.decode()


def on_linux(requirement: Requirement) -> bool:
    """Whether an image may need it."""
    if requirement.marker is None:
        return True
    here = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    return any(
        requirement.marker.evaluate(
            {
                **here,
                "platform_machine": machine,
                "python_version": python,
                "python_full_version": f"{python}.0",
                "platform_python_implementation": "CPython",
                "implementation_name": "cpython",
            }
        )
        for python in PYTHONS
        for machine in MACHINES
    )


def lines(resolved: str, extra: str) -> Iterator[str]:
    """Of the file, from what uv says."""
    yield HEADER
    excluded = UNUSED[extra].union(BREAKS_TRANSFORMERS)
    torch = ""
    for line in resolved.splitlines():
        requirement = Requirement(line)
        if not on_linux(requirement) or (extra == "cpu" and requirement.name in excluded):
            continue
        if requirement.name != "torch":
            yield line
        elif not torch:  # once a platform
            torch = line.split("+")[0].split(" ;")[0]
            yield torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    for extra in EXTRAS:
        written = list(lines(resolve(extra), extra))
        target(extra).write_text("\n".join(written) + "\n", encoding="utf-8")
        sys.stdout.write(f"{target(extra).name}: {len(written) - 1} distributions\n")


if __name__ == "__main__":
    main()
