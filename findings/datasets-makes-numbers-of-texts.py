#!/usr/bin/env python3
"""datasets 5.2: texts of a column that holds one number come back as other values.

What is done: JSON lines whose field `answer` is text in every row but one are loaded with
`load_dataset("json")`.
Seen: the column becomes JSON (`Json`), and text that could be JSON is taken for it: "007" becomes
7, "1.50" becomes 1.5, "NaN" becomes None. Without the one number every text stays as it is. What
was stored is still there, in the Arrow table.
Exits with 0 while that is so, with 1 when it changes. Needs: datasets.
"""

import json
import sys
import tempfile
from pathlib import Path

import datasets

datasets.disable_progress_bars()
TEXTS = ["007", "1.50", "NaN", "plain"]


def loaded(answers: list[object]) -> datasets.Dataset:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"answer": answer}) for answer in answers))
        rows = datasets.load_dataset(
            "json", data_files=str(path), cache_dir=name, split="train", keep_in_memory=True
        )
        return rows.select(range(len(TEXTS)))


mixed, texts = loaded([*TEXTS, 7]), loaded(TEXTS)
given = [row["answer"] for row in mixed]
stored = mixed.with_format("arrow")[:].column("answer").to_pylist()
sys.stdout.write(f"with a number: {given}, stored: {stored}; without: {texts['answer']}\n")
as_seen = given == [7, 1.5, None, "plain"] and [row["answer"] for row in texts] == TEXTS
sys.exit(0 if as_seen else 1)
