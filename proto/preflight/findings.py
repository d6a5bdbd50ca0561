"""What a check found, and how checks are run: one that breaks is told and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "skipped", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact about the machine or the settings."""

    check: str
    """What was looked at, in a word or two."""
    level: Level
    seen: str
    """The value, in one line."""
    limit: str = ""
    """What it may be; empty where `seen` says it."""
    remedy: str = ""
    """How to mend it; empty where `seen` says it, or where there is nothing to mend."""


Check = Callable[[], Iterable[Finding]]


def ok(check: str, seen: str, limit: str = "") -> Finding:
    """As it has to be."""
    return Finding(check=check, level="ok", seen=seen, limit=limit)


def skipped(check: str, why: str) -> Finding:
    """What could not be looked at, and why."""
    return Finding(check=check, level="skipped", seen=why)


def warning(check: str, seen: str, limit: str = "", remedy: str = "") -> Finding:
    """It starts, and may not be what was meant."""
    return Finding(check=check, level="warning", seen=seen, limit=limit, remedy=remedy)


def problem(check: str, seen: str, limit: str = "", remedy: str = "") -> Finding:
    """It does not start, or not for long."""
    return Finding(check=check, level="problem", seen=seen, limit=limit, remedy=remedy)


def made(
    checks: Iterable[tuple[str, Check]], refusals: tuple[type[Exception], ...]
) -> Iterator[Finding]:
    """What the checks find, one after another.

    `refusals` are errors whose message is for the operator: setting, value, limit and remedy.
    """
    for name, check in checks:
        try:
            yield from check()
        except refusals as error:
            yield problem(name, one_line(error))
        except Exception as error:  # noqa: BLE001 - of a check that breaks the others know nothing
            told = f"this check failed: {type(error).__name__}: {one_line(error)}"
            yield problem(name, told, remedy="please report it")


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def has_problem(findings: Iterable[Finding]) -> bool:
    """Whether it would not start."""
    return any(finding.level == "problem" for finding in findings)
