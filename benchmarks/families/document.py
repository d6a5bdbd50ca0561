"""The table of families in docs/training.md, and whether it is of this code."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

from benchmarks.families.arms import ARMS, RIGHT_NATS, WIDE, Cell
from benchmarks.provenance import ROOT
from tests.trainer.learner.tiny_families import FAMILIES, tiny_config

DOCUMENT = ROOT / "docs" / "training.md"
RESULTS = ROOT / "docs" / "families.json"
BEGIN, END = "<!-- families: begin, written by `make families` -->", "<!-- families: end -->"
STUDENT = "student_trainer/learner/"
SAMPLERS = "student_trainer/rollouts/samplers/"
ENGINE = "teacher_server/engine/"
ARMS_FILE = "benchmarks/families/arms.py"
LEARNER = (
    f"{STUDENT}families.py",
    f"{STUDENT}student.py",
    f"{STUDENT}head.py",
    "student_trainer/pretrained.py",
)
SENT = f"{STUDENT}export.py"
OVER_TRANSFORMERS = (*LEARNER, SENT, f"{SAMPLERS}sampling.py", f"{SAMPLERS}loaded_model.py")
DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "learner": LEARNER,
    "hf sampler": (*OVER_TRANSFORMERS, f"{SAMPLERS}hf_sampler.py"),
    "batched sampler": (
        *OVER_TRANSFORMERS,
        f"{SAMPLERS}hf_batched_sampler.py",
        f"{SAMPLERS}running_batch.py",
        f"{SAMPLERS}slot_cache.py",
        f"{SAMPLERS}batch_check.py",
    ),
    "vLLM sampler": (
        *LEARNER,
        SENT,
        f"{SAMPLERS}vllm_sampler.py",
        f"{SAMPLERS}vllm_reload.py",
        "student_trainer/rollouts/weight_buffer.py",
    ),
    "teacher, hf": (
        f"{ENGINE}hf_engine.py",
        f"{ENGINE}float32_head.py",
        f"{ENGINE}checkpoint.py",
    ),
    "teacher, vLLM": (
        f"{ENGINE}vllm_engine.py",
        f"{ENGINE}token_scorer.py",
        f"{ENGINE}row_scores.py",
        f"{ENGINE}cpu_head.py",
        f"{ENGINE}checkpoint.py",
    ),
}
"""Files that decide what an arm makes of a family, besides the one that measures it."""
LIBRARIES = ("torch", "transformers", "vllm")


def digest(family: str, arm: str) -> str:
    """Of the model and of the code that an arm depends on, without comments and docstrings."""
    model = tiny_config(family, **WIDE).to_dict() | {"transformers_version": None}
    whole = hashlib.sha256(json.dumps(model, sort_keys=True, default=str).encode())
    for name in (*DEPENDS_ON[arm], ARMS_FILE):
        whole.update(_code((ROOT / name).read_text(encoding="utf-8")).encode())
    return whole.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of the libraries that compute; +cpu and the like left out."""
    found = {}
    for name in LIBRARIES:
        for distribution in (name, f"{name}-cpu"):
            try:
                found[name] = metadata.version(distribution).partition("+")[0]
            except metadata.PackageNotFoundError:
                continue
    return found


@cache
def _code(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part
                for part in body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return ast.dump(tree)


def read() -> dict[str, Any]:
    """The results; empty where there are none."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"cells": {}}


def cells_of(results: Mapping[str, Any], family: str) -> dict[str, Cell]:
    """By column."""
    return {
        column: Cell(**cell)
        for arm in ARMS
        for column, cell in results["cells"].get(family, {}).get(arm, {}).get("cells", {}).items()
    }


def is_of_this_code(results: Mapping[str, Any], family: str, arm: str) -> bool:
    """Whether an arm was measured by this code, with whatever libraries."""
    known = results["cells"].get(family, {}).get(arm, {})
    return bool(known) and known["code"] == digest(family, arm)


def is_current(results: Mapping[str, Any], family: str, arm: str) -> bool:
    """Whether an arm was measured by this code and these libraries."""
    return (
        is_of_this_code(results, family, arm)
        and results["cells"][family][arm]["versions"] == versions()
    )


def table(results: Mapping[str, Any]) -> str:
    """In Markdown, with a numbered reason for every refusal."""
    columns = [column for _, columns in ARMS.values() for column in columns]
    lines = [f"| family | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    reasons: list[str] = []
    for family in FAMILIES:
        cells = cells_of(results, family)
        told = [_told(cells.get(column), reasons) for column in columns]
        lines.append(f"| {family} | {' | '.join(told)} |")
    lines.append("")
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join(lines).rstrip() + "\n"


def _told(cell: Cell | None, reasons: list[str]) -> str:
    if cell is None:
        return ""
    if cell.refused is not None:
        if cell.refused not in reasons:
            reasons.append(cell.refused)
        return f"refused ({reasons.index(cell.refused) + 1})"
    if cell.gap_nats is None:
        return f"**{cell.raw}**"
    return f"**wrong: {cell.gap_nats:.0e}**" if cell.is_wrong else f"{cell.gap_nats:.0e}"


def section(results: Mapping[str, Any]) -> str:
    """What stands between the markers."""
    with_versions = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{BEGIN}\n\nNats, with {with_versions}; right is at most {RIGHT_NATS:.0e}.\n\n" + (
        f"{table(results)}\n{END}"
    )


def written(text: str, results: Mapping[str, Any]) -> str:
    """The document with the table of these results."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{DOCUMENT} has no line {BEGIN}")
    return pattern.sub(lambda _: section(results), text)
