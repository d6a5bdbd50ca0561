"""Writes the table of columns into docs/run-folder.md, from the schema of recorded rollouts.

Run: make docs. A test compares the file with `document()`.
"""

from __future__ import annotations

from pathlib import Path

from rollout_records.schema import COLUMNS, Column, Shape

PATH = Path(__file__).resolve().parent.parent / "docs" / "run-folder.md"
BEGIN, END = "<!-- columns: written by `make docs` -->\n", "<!-- end of columns -->\n"


def document() -> str:
    """The whole file, with the table as it must be."""
    text = PATH.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{rest[rest.index(END) :]}"


def table() -> str:
    """A row a column."""
    lines = ["| column | holds | what it is |", "|---|---|---|", *map(_row, COLUMNS)]
    return "\n".join(lines) + "\n"


def _row(column: Column) -> str:
    shape = {Shape.SCALAR: "", Shape.PROMPT: "[p]", Shape.TOKENS: "[T]"}.get(column.shape)
    if shape is None:
        shape = "[T][K]" if column.name.startswith("teacher_topk") else "[T][J]"
    null = "" if column.is_required else ", may be null"
    about = column.about.replace("|", "\\|")
    return f"| `{column.name}` | {column.kind}{shape}{null} | {about} |"


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
