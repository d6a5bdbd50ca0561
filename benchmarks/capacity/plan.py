"""The tables of docs/scaling.md."""

from __future__ import annotations


def write_tables() -> None:
    """Into the document."""
