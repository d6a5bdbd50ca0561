#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1: texts of a column that holds one number come back as other values.
#
# What is done: JSON lines whose field `answer` is text in every row but one are loaded with load_dataset("json").
# Seen: the column becomes JSON (`Json`), and text that reads as a number is taken for one: "007" becomes 7, "1.50"
# becomes 1.5, "NaN" becomes None. Without the one number every text stays as it is. The Arrow table still has these
# three as they were written; "plain" has its quotes there.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cat >texts.py <<'PY'
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
TEXTS = ["007", "1.50", "NaN", "plain"]


def loaded(name: str, answers: list[object]) -> datasets.Dataset:
    path = Path(f"{name}.jsonl")
    path.write_text("\n".join(json.dumps({"answer": answer}) for answer in answers))
    rows = datasets.load_dataset(
        "json", data_files=str(path), cache_dir="cache", split="train", keep_in_memory=True
    )
    return rows.select(range(len(TEXTS)))


mixed, texts = loaded("mixed", [*TEXTS, 7]), loaded("texts", TEXTS)
given = [row["answer"] for row in mixed]
stored = mixed.with_format("arrow")[:].column("answer").to_pylist()
without = [row["answer"] for row in texts]
sys.stdout.write(f"with a number: {given}, stored: {stored}; without: {without}\n")
sys.exit(0 if given == [7, 1.5, None, "plain"] and without == TEXTS else 1)
PY
HF_HOME=$folder/home env/bin/python texts.py
