"""What guides name exists, and what must not stand in the source does not.

Run: python -m pytest tests/test_guides.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tracked_files import ROOT, tracked

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = ROOT / "docs" / "LOG.md"
"""Tells of files that are no more."""


@pytest.mark.parametrize(
    "guide", [path for path in GUIDES if path != HISTORY], ids=lambda path: path.name
)
def test_paths_in_a_guide_exist(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    tops = {name.split("/")[0] for name in tracked()}
    # `a/b` is a path when `a` is a file or folder of ours; other words in backticks are not.
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", text)
    paths = {ROOT / name for name in named if name.split("/")[0] in tops}
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    paths |= {guide.parent / name for name in links}
    if guide.name in ("README.md", "CONTRIBUTING.md"):
        assert paths, "it names no path"
    missing = [path for path in paths if not path.exists()]
    assert sorted(str(path.relative_to(ROOT)) for path in missing) == []


# Joined here, so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(
    "|".join([r"(?<![\w.])/wo" + "rk/", "/tmp" + "/build", r"(?<![\w./])/ro" + "ot/"])
)
REGISTRY_HOSTS = re.compile("|".join(["pypi" + r"\.org", "python" + "hosted", "npmjs" + r"\."]))


def test_source_names_no_machine_and_no_package_registry() -> None:
    found = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if MACHINE_PATHS.search(line) or REGISTRY_HOSTS.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert found == []
