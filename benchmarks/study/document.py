"""The tables of docs/study.md, written between its markers; the prose around them is by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.study.arms import ARMS, ROOT
from benchmarks.study.claims import Finding, findings
from benchmarks.study.results import REFERENCE, Results, cost_to_reach, describe, over_seeds, target

DOCUMENT = ROOT / "docs" / "study.md"
COLUMNS = (
    "arm",
    "seeds",
    "exact match",
    "tokens",
    "kept",
    "wall",
    "tokens to goal",
    "wall to goal",
)


def rows(arms: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(pair, cells) of every arm that has results, in the order of ARMS.

    Tokens and wall time are shares of full OPD's on the pair: ratios of means and of medians. The
    goal is the accuracy that full OPD ends with.
    """
    found = []
    for arm in ARMS:
        known = arms.get(arm.name)
        if known is None:
            continue
        reference, goal = arms.get(REFERENCE[arm.pair.name]), target(arms, arm.pair.name)
        cells = [arm.label, str(len(known["seeds"]))]
        cells.append(describe(over_seeds(known, "accuracy"), lambda value: f"{value:.1%}"))
        if reference is None or goal is None:
            cells += ["-"] * 5
        else:
            whole = over_seeds(reference, "generated_tokens").mean
            cells += [
                f"{over_seeds(known, name).mean / whole:.2f}"
                for name in ("generated_tokens", "kept_tokens")
            ]
            whole_s = median(record["wall_s"] for record in reference["seeds"])
            cells.append(f"{median(r['wall_s'] for r in known['seeds']) / whole_s:.2f}")
            cells.append(_to_goal(known, goal, "generated_tokens", whole))
            cells.append(_to_goal(known, goal, "wall_s", whole_s))
        errors = sum(record["error"] is not None for record in known["seeds"])
        if errors:
            cells[0] += f" ({errors} failed)"
        found.append((arm.pair.name, cells))
    return found


def _to_goal(known: Mapping[str, Any], goal: float, cost: str, whole: float) -> str:
    """Median share over the seeds that got there, and how many did if not all."""
    reached = [cost_to_reach(record, goal, cost) for record in known["seeds"]]
    there = [value for value in reached if value is not None]
    if not there:
        return "never"
    share = f"{median(there) / whole:.2f}"
    return share if len(there) == len(reached) else f"{share} ({len(there)} of {len(reached)})"


def results_table(arms: Mapping[str, Any]) -> Table:
    """For the terminal."""
    table = Table(title="the study so far", title_justify="left", pad_edge=False)
    for index, column in enumerate(("pair", *COLUMNS)):
        table.add_column(column, justify="left" if index < 2 else "right")
    for pair, cells in rows(arms):
        table.add_row(pair, *cells)
    return table


def write_document(results: Results) -> str:
    """Replaces what stands between `<!-- NAME -->` and `<!-- end NAME -->`; returns the path."""
    text = DOCUMENT.read_text(encoding="utf-8")
    parts = {
        "low": _markdown(
            [COLUMNS, *(cells for pair, cells in rows(results.arms) if pair == "low")]
        ),
        "high": _markdown(
            [COLUMNS, *(cells for pair, cells in rows(results.arms) if pair == "high")]
        ),
        "claims": _markdown(
            [
                ("paper", "claim", "published", "here", "seeds", "agrees"),
                *(_finding_cells(finding) for finding in findings(results.arms)),
            ]
        ),
    }
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{DOCUMENT} has no {begin} ... {end}")
        replacement = f"{begin}\n{content}\n{end}"
        text = pattern.sub(lambda _, new=replacement: new, text)
    DOCUMENT.write_text(text, encoding="utf-8")
    return str(DOCUMENT)


def _finding_cells(finding: Finding) -> list[str]:
    claim = finding.claim
    if claim.figure in ("accuracy", "early_accuracy"):
        when = "" if claim.figure == "accuracy" else " after 4 steps"
        here = f"{finding.other_mean:.1%} to {finding.arm_mean:.1%}{when}"
    else:
        what = "tokens" if claim.figure == "generated_tokens" else "wall time"
        here = f"{finding.arm_mean / finding.other_mean:.2f} of the {what}"
    compared = f"{here} (`{claim.arm}` against `{claim.other}`)"
    return [
        claim.paper,
        claim.says,
        claim.published,
        compared,
        str(finding.num_seeds),
        finding.answer,
    ]


def _markdown(table: list[Any]) -> str:
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
