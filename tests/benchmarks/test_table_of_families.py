"""The table of families is of this code, none of it is wrong, and one of a kind is measured anew.

Run: python -m pytest tests/benchmarks/test_table_of_families.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families import document
from benchmarks.families.arms import ARMS, RIGHT_NATS, Cell, measured, write_model
from benchmarks.families.document import (
    DOCUMENT,
    cells_of,
    digest,
    is_of_this_code,
    read,
    table,
    written,
)
from benchmarks.provenance import ROOT
from tests.trainer.learner.tiny_families import FAMILIES

AGAIN = "run: make families"


def test_the_table_is_of_this_code() -> None:
    results = read()
    stale = [(f, arm) for f in FAMILIES for arm in ARMS if not is_of_this_code(results, f, arm)]
    assert stale == [], AGAIN
    text = DOCUMENT.read_text(encoding="utf-8")
    assert written(text, results) == text, AGAIN


def test_no_cell_is_wrong_and_silent() -> None:
    results = read()
    columns = {column for _, columns in ARMS.values() for column in columns}
    for family in FAMILIES:
        cells = cells_of(results, family)
        assert cells.keys() == columns, family
        assert [column for column, cell in cells.items() if cell.is_wrong] == [], family


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("gemma2", id="soft-caps and sliding window: gemma2"),
        pytest.param("granite", id="scaled logits: granite"),
        pytest.param("qwen3_moe", id="experts held fused: qwen3_moe"),
        pytest.param("gpt_neox", id="other names, biases and dropout: gpt_neox"),
        pytest.param("gemma3", id="a wrapper: gemma3"),
    ],
)
async def test_one_family_a_kind_of_risk_is_measured_anew(family: str, tmp_path: Path) -> None:
    known = cells_of(read(), family)
    write_model(tmp_path, family)
    for arm in ("learner", "hf sampler", "teacher, hf"):
        for column, cell in (await measured(arm, tmp_path)).items():
            assert not cell.is_wrong, column
            assert (cell.refused is None) == (known[column].refused is None), column


def test_a_gap_and_what_is_no_number_are_wrong_and_a_refusal_is_not() -> None:
    assert not Cell(RIGHT_NATS).is_wrong
    assert Cell(2 * RIGHT_NATS).is_wrong
    assert Cell(float("nan")).is_wrong
    assert not Cell(refused="by name").is_wrong
    assert Cell(raw="KeyError: what").is_wrong


def test_a_table_shows_what_is_wrong_and_why_something_is_refused() -> None:
    cells = {
        "learner": {"cells": {"learner": {"gap_nats": 0.5, "refused": None}}},
        "teacher, hf": {"cells": {"teacher, hf": {"gap_nats": None, "refused": "no such thing"}}},
    }
    said = table({"cells": {"olmo": cells}})
    assert "| olmo | **wrong: 5e-01** |  |" in said
    assert "refused (1)" in said
    assert said.endswith("1. no such thing\n")


def test_a_digest_is_of_the_code_and_not_of_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = document.DEPENDS_ON["learner"]
    source, before = (ROOT / first).read_text(encoding="utf-8"), digest("llama", "learner")
    changed = tmp_path / "changed.py"
    monkeypatch.setitem(document.DEPENDS_ON, "learner", (str(changed), *others))
    changed.write_text(f"# A remark.\n{source}", encoding="utf-8")
    assert digest("llama", "learner") == before
    changed.write_text(f"{source}\nX = 1\n", encoding="utf-8")
    assert digest("llama", "learner") != before


def test_a_digest_is_of_the_model_too() -> None:
    assert digest("llama", "learner") != digest("olmo", "learner")
