"""What the papers say, each claim as a comparison of two arms of the study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from benchmarks.study.results import Record

Figure = Literal["accuracy", "early_accuracy", "wall_s", "generated_tokens"]
EARLY_STEP = 4
"""A third of the run; the papers' early figures are of a fifth to a third of theirs."""
SAME_WITHIN = 0.03
"""Accuracies closer than this are the same where a claim says "no loss"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`arm` against `other`: by the paper's word, `figure` is above, below or not below."""

    paper: str
    says: str
    published: str
    arm: str
    other: str
    figure: Figure
    expected: Literal["above", "below", "not below"]


CLAIMS = (
    Claim(
        paper="Prune-OPD",
        says="its batch controller shortens training on a low-compatibility pair",
        published="38 to 68 % less time (table 1)",
        arm="prune_batch",
        other="topk",
        figure="wall_s",
        expected="below",
    ),
    Claim(
        paper="Prune-OPD",
        says="and loses no accuracy",
        published="AIME24 43.5 to 45.2, 33.5 to 33.3, 7.3 to 7.3, 14.8 to 16.3",
        arm="prune_batch",
        other="topk",
        figure="accuracy",
        expected="not below",
    ),
    Claim(
        paper="Prune-OPD",
        says="on a high-compatibility pair the window opens by itself and nothing is lost",
        published="AIME24 67.1 to 66.7, 2.9 % less time (table 2)",
        arm="high_prune_batch",
        other="high_topk",
        figure="accuracy",
        expected="not below",
    ),
    Claim(
        paper="ours",
        says="stopping in flight beats the batch controller in tokens",
        published="-",
        arm="prune_both",
        other="prune_batch",
        figure="generated_tokens",
        expected="below",
    ),
    Claim(
        paper="ours",
        says="stopping in flight learns more from the same steps than full OPD",
        published="-",
        arm="topk_stop",
        other="topk",
        figure="early_accuracy",
        expected="above",
    ),
    Claim(
        paper="IW-OPD",
        says="weights beat plain OPD early",
        published="52.0 to 55.5 mean at step 10 of about 55 (4B)",
        arm="iw",
        other="opd",
        figure="early_accuracy",
        expected="above",
    ),
    Claim(
        paper="IW-OPD",
        says="and at the end",
        published="55.3 to 57.1 mean (4B), 39.4 to 40.3 (1.7B)",
        arm="iw",
        other="opd",
        figure="accuracy",
        expected="above",
    ),
    Claim(
        paper="IW-OPD",
        says="the first 30 % of positions alone are as good as all",
        published="figure only: at or above full OPD",
        arm="first30",
        other="opd",
        figure="accuracy",
        expected="not below",
    ),
    Claim(
        paper="IW-OPD",
        says="the last 30 % teach little",
        published="figure only",
        arm="last30",
        other="opd",
        figure="accuracy",
        expected="below",
    ),
    Claim(
        paper="TOPD",
        says="a quarter of the horizon keeps the accuracy",
        published="54.8 to 55.0, 29.7 h to 10.2 h",
        arm="cutoff25",
        other="opd",
        figure="accuracy",
        expected="not below",
    ),
    Claim(
        paper="LSM",
        says="matching the teacher's top-k beats the sampled token",
        published="36.4 to 41.7 mean",
        arm="lsm",
        other="opd",
        figure="accuracy",
        expected="above",
    ),
    Claim(
        paper="LSM",
        says="without top-p it is worse",
        published="AIME24 avg@32 23.6 to 17.7",
        arm="lsm_no_top_p",
        other="lsm",
        figure="accuracy",
        expected="below",
    ),
    Claim(
        paper="LSM",
        says="without renormalisation it collapses",
        published="rapid collapse, figure only",
        arm="lsm_no_renorm",
        other="lsm",
        figure="accuracy",
        expected="below",
    ),
    Claim(
        paper="Block gating",
        says="a block gate helps when rollouts are reused",
        published="pass@8 49.8 to 51.6 mean, 2 epochs, one seed",
        arm="reuse_block",
        other="reuse",
        figure="accuracy",
        expected="above",
    ),
    Claim(
        paper="Block gating",
        says="blocks rather than tokens (not tried in the paper)",
        published="-",
        arm="reuse_block",
        other="reuse_token",
        figure="accuracy",
        expected="above",
    ),
    Claim(
        paper="Block gating",
        says="blocks rather than sequences (not tried in the paper)",
        published="-",
        arm="reuse_block",
        other="reuse_sequence",
        figure="accuracy",
        expected="above",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A claim next to what was seen."""

    claim: Claim
    arm_mean: float
    other_mean: float
    num_seeds: int
    answer: str


def findings(arms: Mapping[str, Any]) -> list[Finding]:
    """Of the claims whose two arms have seeds in common."""
    found = []
    for claim in CLAIMS:
        if claim.arm not in arms or claim.other not in arms:
            continue
        other = {r["seed"]: _figure(r, claim.figure) for r in arms[claim.other]["seeds"]}
        pairs = [
            (_figure(r, claim.figure), other[r["seed"]])
            for r in arms[claim.arm]["seeds"]
            if r["seed"] in other
        ]
        if pairs:
            mean_of = median if claim.figure == "wall_s" else fmean
            found.append(
                Finding(
                    claim=claim,
                    arm_mean=mean_of(a for a, _ in pairs),
                    other_mean=mean_of(b for _, b in pairs),
                    num_seeds=len(pairs),
                    answer=_answer(claim, pairs),
                )
            )
    return found


def _figure(record: Record, figure: Figure) -> float:
    if figure == "early_accuracy":
        points = [p["accuracy"] for p in record["curve"] if p["step"] <= EARLY_STEP]
        return float(points[-1])
    return float(record[figure])


def _answer(claim: Claim, pairs: list[tuple[float, float]]) -> str:
    """Yes or no where every seed says so; else it is not settled."""
    if claim.figure in ("accuracy", "early_accuracy") and not any(a or b for a, b in pairs):
        return "cannot be told: neither learnt anything"
    if claim.expected == "not below":
        holds = [a >= b - SAME_WITHIN for a, b in pairs]
    elif claim.expected == "above":
        holds = [a > b for a, b in pairs]
    else:
        holds = [a < b for a, b in pairs]
    if all(holds):
        return "yes"
    return "no" if not any(holds) else f"not settled ({sum(holds)} of {len(holds)} seeds)"
