"""The files of the repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.waiting import LIMIT_S

ROOT = Path(__file__).resolve().parent.parent


def tracked(pattern: str = "*") -> list[str]:
    """Files of the repository, without what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
