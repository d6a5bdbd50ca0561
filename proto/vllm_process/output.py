"""What the processes of a vLLM engine print, in a file: its last words say why an engine is gone.

vLLM itself says only "see root cause above", and above is the terminal of whoever started it. The
plugin runs in every process of vLLM, so it turns the output of a child that was told to.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

_VARIABLE = "DRIFTLINE_ENGINE_OUTPUT"
_ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception)): (.+)")
_WRAPPERS = (
    "Engine core initialization failed",
    "EngineCore encountered",
    "WorkerProc init",
    "cancelled",
)
"""What vLLM says when a process below has failed; the cause is an earlier line."""
_DEATH = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -?\d+\)")
"""Of one that had no time to say why."""


class EngineOutput:
    """The file of one engine. It stays if its last words were told, else it goes with that."""

    def __init__(self, owner: str) -> None:
        """An empty file, driftline-OWNER-....log, in the folder of temporary files."""
        number, name = tempfile.mkstemp(prefix=f"driftline-{owner}-", suffix=".log")
        os.close(number)
        self.path = Path(name)
        self._told = False

    @contextmanager
    def of_children(self) -> Iterator[None]:
        """vLLM's processes started within append what they print, instead of printing it."""
        os.environ[_VARIABLE] = f"{os.getpid()} {self.path}"
        try:
            yield
        finally:
            del os.environ[_VARIABLE]

    @contextmanager
    def of_logger(self, name: str) -> Iterator[None]:
        """What a logger of this process has made by the end of the block for itself to write to is
        the file from then on: vLLM's front end repeats at length what its processes said."""
        yield
        logger = logging.getLogger(name)
        if logger.handlers:
            logger.handlers[:] = [logging.FileHandler(self.path, encoding="utf-8")]

    def cause(self, error: BaseException) -> str:
        """One line: what the engine's processes said last of an error, else the error that vLLM
        raised here."""
        if said := last_words(self.path):
            self._told = True
            return f"{said}; its output is in {self.path}"
        if isinstance(error, ValidationError):
            return "; ".join(problem["msg"] for problem in error.errors())
        told = " ".join(str(error).split())
        if told.startswith(_WRAPPERS):
            self._told = True
            return f"a process of it ended without a word; its output is in {self.path}"
        return told

    def close(self) -> None:
        """Removes the file, unless somebody was pointed to it."""
        if not self._told:
            self.path.unlink(missing_ok=True)


def write_where_told() -> None:
    """Does nothing except in a child of `EngineOutput.of_children`."""
    parent, _, path = os.environ.get(_VARIABLE, "").partition(" ")
    if parent == str(os.getppid()):
        output = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)


def last_words(path: Path) -> str:
    """The last error that the file tells of, as `Type: message`, else the death of a worker; empty
    when it tells of none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        match = _ERROR.search(line)
        if match is not None and not match[2].startswith(_WRAPPERS):
            return f"{match[1]}: {match[2].strip()}"
    return next((found[0] for line in lines if (found := _DEATH.search(line))), "")
