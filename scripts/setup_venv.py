"""Makes the virtual environment that every make target uses. Standard library only.

Order matters: torch first, so that vLLM takes the build that is there, then the project with its
extras. vLLM's CPU build drags in CUDA builds of torchvision, torchaudio and torchcodec, whose
import breaks transformers on a CPU torch; nothing here uses them, so they go again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
BREAKS_TRANSFORMERS = ["torchvision", "torchaudio", "torchcodec"]


def run_step(number: int, total: int, title: str, command: list[str]) -> None:
    """Runs one command with a clock; shows its output only when it fails."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                show(number, total, title, time.monotonic() - started, end="\r")
                time.sleep(0.5)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        show(number, total, title, time.monotonic() - started, end="\n")
        if process.returncode != 0:
            output.seek(0)
            sys.stderr.write(output.read().decode(errors="replace"))
            sys.exit(f"setup: {title} failed with exit code {process.returncode}")


def show(number: int, total: int, title: str, seconds: float, *, end: str) -> None:
    """One line of progress; a pipe gets only the finished lines."""
    if end == "\r" and not sys.stdout.isatty():
        return
    bar = "#" * number + "." * (total - number)
    sys.stdout.write(f"setup [{bar}] {number}/{total} {title:<44} {seconds:5.0f} s{end}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--torch-index", default="", help="package index that torch comes from")
    arguments = parser.parse_args()

    python = str(arguments.venv / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    torch = [TORCH] + (["--index-url", arguments.torch_index] if arguments.torch_index else [])
    steps = [
        (f"torch ({arguments.accelerator})", [*pip, "install", *torch]),
        (
            "driftline, vllm and the tools",
            [*pip, "install", "-e", f".[{arguments.accelerator},dev]"],
        ),
    ]
    if arguments.accelerator == "cpu":
        remove = [*pip, "uninstall", "-y", *BREAKS_TRANSFORMERS]
        steps.append(("removing CUDA builds that break CPU imports", remove))
    venv.create(arguments.venv, with_pip=True, clear=True)
    for number, (title, command) in enumerate(steps, start=1):
        run_step(number, len(steps), title, command)


if __name__ == "__main__":
    main()
