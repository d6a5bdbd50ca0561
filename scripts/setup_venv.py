"""Makes the virtual environment that every make target uses. Standard library only.

Installs with uv, which is fetched into the environment where it is not on PATH, and with pip where
there is no uv to be had. vLLM's CPU build asks for CUDA builds of torchvision, torchaudio and
torchcodec, whose import breaks transformers on a CPU torch; nothing here uses them, so they are
left out (uv) or go again (pip).
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PYPROJECT = tomllib.loads(Path("pyproject.toml").read_text())
UV = f"uv{PYPROJECT['tool']['uv']['required-version']}"
BREAKS_TRANSFORMERS = PYPROJECT["tool"]["uv"]["exclude-dependencies"][0]["dependencies"]
PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}
"""Where uv looks for what pip reads from its configuration."""
NO_INDEX = re.compile(
    "failed to fetch|error sending request|could not find a version|no matching distribution",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Step:
    """One command of the set-up."""

    title: str
    command: list[str]
    may_fail: bool = False
    environment: dict[str, str] = field(default_factory=dict)


class SetupError(Exception):
    """A step that failed; one line says which, why and what to do."""


class Progress:
    """A clock beside each step; a pipe gets only the finished lines."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._number = 0

    def run(self, step: Step, remaining: int) -> bool:
        """Runs one step; False when it failed and may. Raises SetupError."""
        self._number += 1
        started = time.monotonic()
        with self._log.open("ab+") as output:
            begin = output.tell()
            process = subprocess.Popen(
                step.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **step.environment},
            )
            try:
                while process.poll() is None:
                    self._show(step.title, remaining, time.monotonic() - started, end="\r")
                    time.sleep(0.2)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            self._show(step.title, remaining, time.monotonic() - started, end="\n")
            output.seek(begin)
            said = output.read().decode(errors="replace")
        if process.returncode and not step.may_fail:
            raise SetupError(f"{step.title} failed: {cause(said)}; everything is in {self._log}")
        return process.returncode == 0

    def _show(self, title: str, remaining: int, seconds: float, *, end: str) -> None:
        if end == "\r" and not sys.stdout.isatty():
            return
        total = self._number + remaining
        bar = "#" * self._number + "." * remaining
        sys.stdout.write(f"setup [{bar}] {self._number}/{total} {title:<44} {seconds:5.0f} s{end}")
        sys.stdout.flush()


def cause(said: str) -> str:
    """Why a command failed, in one line, from all that it printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error|cause", line, re.IGNORECASE)]
    last = (errors or lines or ["it said nothing"])[-1]
    if NO_INDEX.search(said):
        last += " (check the network, pip's configuration, UV_DEFAULT_INDEX and TORCH_INDEX)"
    return last


def uv_environment(pip: list[str], given: Collection[str]) -> dict[str, str]:
    """pip's configuration in uv's variables, but for those that are given already."""
    listed = subprocess.run(
        [*pip, "config", "list"], capture_output=True, text=True, check=False, timeout=60
    )
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # as pip does: the later one wins
        for line in listed.stdout.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}.") and name.removeprefix(f"{section}.") in PIP_TO_UV:
                words = str(ast.literal_eval(value)).split()
                variable = PIP_TO_UV[name.removeprefix(f"{section}.")]
                found[variable] = ("," if variable == "UV_FIND_LINKS" else " ").join(words)
    if "UV_INDEX" in found and "UV_INDEX" not in given:
        # pip takes the newest of all indexes, uv that of the first index which has the package.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in found.items() if name not in given}


def with_uv(uv: str, python: str, accelerator: str, torch_index: str, pip: list[str]) -> list[Step]:
    """The steps of an installation by uv, torch first only where it has an index of its own."""
    environment = uv_environment(pip, os.environ)
    install = [uv, "pip", "install", "--python", python]
    steps = []
    if torch_index:
        command = [*install, "--default-index", torch_index, torch_requirement()]
        steps.append(Step(f"torch ({accelerator})", command, environment=environment))
    # Half of the time, but else every start of vLLM takes seconds more until all is compiled.
    command = [*install, "--compile-bytecode", *project(accelerator)]
    return [*steps, Step("torch, vllm, driftline and the tools", command, environment=environment)]


def with_pip(pip: list[str], accelerator: str, torch_index: str) -> Iterator[Step]:
    """The steps of an installation by pip: torch first, so that vLLM takes the build of it."""
    index = ["--index-url", torch_index] if torch_index else []
    yield Step(f"torch ({accelerator})", [*pip, "install", torch_requirement(), *index])
    yield Step("driftline, vllm and the tools", [*pip, "install", *project(accelerator)])
    if accelerator == "cpu":
        remove = [*pip, "uninstall", "-y", *BREAKS_TRANSFORMERS]
        yield Step("removing CUDA builds that break CPU imports", remove)


def project(accelerator: str) -> list[str]:
    """Both distributions, from the tree."""
    return ["-e", "proto", "-e", f".[{accelerator},dev]"]


def torch_requirement() -> str:
    """The version of torch that the project names."""
    dependencies = PYPROJECT["project"]["dependencies"]
    (torch,) = [line for line in dependencies if line.startswith("torch==")]
    return str(torch)


def usable_uv() -> str | None:
    """The uv on PATH, unless it is so old that it would skip the project's settings."""
    uv = shutil.which("uv")
    if uv is None:
        return None
    said = subprocess.run([uv, "--version"], capture_output=True, text=True, check=False).stdout
    numbers = re.findall(r"\d+", said)[:2]
    wanted = re.findall(r"\d+", UV.partition(",")[0])
    return uv if [int(n) for n in numbers] >= [int(n) for n in wanted] else None


def make(folder: Path, accelerator: str, torch_index: str, *, use_uv: bool) -> None:
    """A new environment in the folder, whatever was there. Raises SetupError."""
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    progress = Progress(log)
    uv = usable_uv() if use_uv else None
    missing = use_uv and uv is None
    installing = 1 + bool(torch_index) if use_uv else 2 + (accelerator == "cpu")
    making = [sys.executable, "-m", "venv", "--clear", str(folder)]
    progress.run(Step("environment", making), remaining=missing + installing)
    if missing:
        fetched = Step("uv", [*pip, "install", "--retries", "1", UV], may_fail=True)
        uv = str(folder / "bin" / "uv") if progress.run(fetched, installing) else None
    if uv is None:
        steps = list(with_pip(pip, accelerator, torch_index))
    else:
        steps = with_uv(uv, python, accelerator, torch_index, pip)
    for number, step in enumerate(steps, start=1):
        progress.run(step, remaining=len(steps) - number)
    log.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--torch-index", default="", help="package index that torch comes from")
    parser.add_argument("--installer", choices=["auto", "pip"], default="auto", help="auto: uv")
    arguments = parser.parse_args()
    try:
        make(
            arguments.venv,
            arguments.accelerator,
            arguments.torch_index,
            use_uv=arguments.installer == "auto",
        )
    except SetupError as error:
        sys.exit(f"setup: {error}")


if __name__ == "__main__":
    main()
