"""Findings for a person, as they come, or for a program, as one JSON object."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from preflight.checkpoints import fetching_nothing
from preflight.findings import Finding, has_problem

STYLES = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "bold red"}
LEVEL_WIDTH = 9
CHECK_WIDTH = 12


def shown(findings: Iterable[Finding], console: Console) -> list[Finding]:
    """Prints each as soon as it is known, and a line that counts them."""
    found = []
    for finding in findings:
        found.append(finding)
        lines = Text(finding.seen)
        if finding.limit:
            lines.append(f" ({finding.limit})")
        if finding.remedy:
            lines.append(f"\n-> {finding.remedy}", style="" if finding.level == "ok" else "italic")
        head = Text.assemble(
            (f"{finding.level:<{LEVEL_WIDTH}}", STYLES[finding.level]),
            (f"{finding.check:<{CHECK_WIDTH}}", "bold"),
        )
        _print(console, head, lines)
    console.print(summary(found), style=_style_of(found), highlight=False)
    return found


def _print(console: Console, head: Text, body: Text) -> None:
    """The body beside the head, its further lines below its first; broken where a terminal ends."""
    indent = len(head)
    width = max(20, console.width - indent) if console.is_terminal else None
    first, *rest = body.wrap(console, width) if width else body.split("\n")
    lines = [Text.assemble(head, first), *(Text.assemble(" " * indent, line) for line in rest)]
    for line in lines:
        line.rstrip()
        console.print(line, highlight=False, soft_wrap=True)


def _style_of(findings: Sequence[Finding]) -> str:
    counted = {finding.level for finding in findings}
    return next((STYLES[one] for one in ("problem", "warning", "ok") if one in counted), "")


def summary(findings: Sequence[Finding]) -> str:
    """How many of each, the worst first."""
    counted = Counter(finding.level for finding in findings)
    words = {"problem": "problems", "warning": "warnings"}
    parts = [
        f"{number} {words.get(level, level) if number > 1 else level}"
        for level in ("problem", "warning", "ok", "skipped")
        if (number := counted[level])
    ]
    return ", ".join(parts)


def told(findings: Iterable[Finding], *, in_json: bool, program: str, version: str) -> bool:
    """Prints them, as they come or as JSON; returns whether there is a problem. They are made here,
    and nothing is fetched for them."""
    with fetching_nothing():
        if not in_json:
            return has_problem(shown(findings, Console()))
        found = [*findings]
    sys.stdout.write(as_json(found, program, version) + "\n")
    return has_problem(found)


def as_json(findings: Iterable[Finding], program: str, version: str) -> str:
    """{"program", "version", "problem": whether there is one, "findings": [...]}."""
    found = [*findings]
    told = {
        "program": program,
        "version": version,
        "problem": has_problem(found),
        "findings": [asdict(finding) for finding in found],
    }
    return json.dumps(told, indent=2)
