"""What was measured so far: written after every row, gone on from, shown as tables of Markdown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.provenance import ROOT, commit, provenance
from student_trainer.process.writing import write_whole

DONE, FAILED, CUT, SKIPPED, WAITS = "done", "failed", "cut off", "skipped", "not run yet"
SOURCES = ("student_trainer", "teacher_server", "proto", "benchmarks/gpu")
Record = dict[str, Any]


class Results:
    """The file of one command; of other code or another card it begins anew."""

    def __init__(self, path: Path, code: str, card: Mapping[str, Any]) -> None:
        """`card`: as a child tells it, with the size of everything."""
        self._path = path
        self._card, self._made = dict(card), provenance()
        self._of = {"code": code, **{name: card[name] for name in ("card", "size", "torch")}}
        self.parts: dict[str, Record] = {}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.get("of") == self._of:
                self.parts = kept["parts"]

    def state(self, name: str) -> str:
        """Of a part."""
        return str(self.parts.get(name, {}).get("state", WAITS))

    def to_run(self, names: Sequence[str]) -> list[str]:
        """Those that are not done: first what was never begun, then what failed before."""
        left = [name for name in names if self.state(name) != DONE]
        return sorted(left, key=lambda name: self.state(name) in (FAILED, CUT))

    def keep(self, name: str, **record: Any) -> None:
        """Takes the place of what the part had before."""
        self.parts[name] = record
        self.write()

    def write(self) -> None:
        """The file, in one go, parts in their order."""
        content = {
            "made": self._made,
            "of": self._of,
            "card": self._card,
            "parts": {name: self.parts[name] for name in PARTS if name in self.parts},
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(content, indent=1) + "\n")

    def document(self) -> str:
        """A table a part, and one line of what ran them."""
        return "\n".join([self._about(), *self._tables()]) + "\n"

    def _about(self) -> str:
        card, peak = self._card, self._card.get("peak_tflops")
        return (
            f"{card['card']}, commit {self._of['code']}, torch {card['torch']}, transformers "
            f"{card['transformers']}; a large product reaches {card['product_tflops']:.3g} TFLOP/s"
            f"{f' of {peak:.0f}' if peak else ''}, a copy {card['copy_tb_per_s']:.3g} TB/s"
        )

    def _tables(self) -> Iterator[str]:
        for name, part in PARTS.items():
            record = self.parts.get(name, {})
            seconds = f", {record['seconds']:.0f} s" if "seconds" in record else ""
            yield f"\n({part.letter}) {part.title}: {self.state(name)}{seconds}"
            if error := record.get("error"):
                yield f"\n{error}"
            if rows := record.get("rows"):
                yield f"\n{table(rows)}"


def table(rows: Sequence[Record]) -> str:
    """Of Markdown: a column a figure, in the order in which they came, and errors."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    errors = ["error"] if any(row["error"] for row in rows) else []
    lines = [
        ["", *(name.replace("_per_", "/").replace("_", " ") for name in names), *errors],
        ["---", *["---:"] * len(names), *["---"] * len(errors)],
    ]
    for row in rows:
        shown = [_shown(row["figures"].get(name)) for name in names]
        lines.append([row["name"], *shown, *([row["error"] or ""] if errors else [])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def code_of_this(told: str | None = None) -> str:
    """The commit, or what was told; with a digest of the sources where it does not say all."""
    if told is not None:
        return told
    found = commit()
    if found != "unknown" and not found.endswith("-dirty"):
        return found
    whole = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            whole.update(path.read_bytes())
    return f"{found}+{whole.hexdigest()[:12]}"
