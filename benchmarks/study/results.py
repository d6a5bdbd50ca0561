"""benchmarks/results/study.json: one record an arm and seed, and what follows from them.

The file is written after every run, so that a study can be ended and goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.study.arms import BASE_CONFIG, Arm
from student_trainer.process.writing import write_whole

REFERENCE = {"low": "opd", "high": "high_opd"}
"""Pair -> the arm whose final accuracy is the target of all arms of the pair."""
SAME_LOSS = (
    ("topk_stop", "topk"),
    ("prune_stop", "topk"),
    ("prune_batch", "topk"),
    ("high_topk_stop", "high_topk"),
)
"""(arm, full OPD with the loss of the arm): what pruning alone is worth."""
Record = Mapping[str, Any]


class Results:
    """The records of a study, by arm."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arms: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.arms = json.loads(path.read_text(encoding="utf-8"))["arms"]

    def has(self, arm: Arm, seed: int, *, steps: int) -> bool:
        """Whether this run was done with these very settings."""
        known = self.arms.get(arm.name)
        return (
            known is not None
            and known["digest"] == digest(arm, steps)
            and any(record["seed"] == seed for record in known["seeds"])
        )

    def add(self, arm: Arm, record: Record, *, steps: int) -> None:
        """Keeps a record and writes the file; records of other settings of the arm are dropped."""
        known = self.arms.get(arm.name)
        if known is None or known["digest"] != digest(arm, steps):
            known = self.arms[arm.name] = {
                "pair": arm.pair.name,
                "label": arm.label,
                "changes": arm.changes,
                "steps": steps,
                "digest": digest(arm, steps),
                "seeds": [],
            }
        others = [r for r in known["seeds"] if r["seed"] != record["seed"]]
        known["seeds"] = sorted([*others, dict(record)], key=lambda r: r["seed"])
        self.write()

    def write(self) -> None:
        """Replaces the file in one go."""
        content = {
            "made": provenance(),
            "ratios": ratios(self.arms),
            "arms": self.arms,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation over seeds; the latter is None for a single seed."""

    mean: float
    deviation: float | None
    num_seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def over_seeds(arm: Mapping[str, Any], value: str) -> Spread:
    """A figure of an arm's records."""
    return spread([record[value] for record in arm["seeds"]])


def target(arms: Mapping[str, Any], pair: str) -> float | None:
    """The accuracy that full OPD ended with on a pair, mean over seeds."""
    reference = arms.get(REFERENCE[pair])
    return None if reference is None else over_seeds(reference, "accuracy").mean


def cost_to_reach(record: Record, accuracy: float, cost: str) -> float | None:
    """`wall_s` or `generated_tokens` when the curve first reaches an accuracy, else None.

    Evaluations lie some steps apart; between two of them the curve is taken as straight.
    """
    before = None
    for point in record["curve"]:
        if point["accuracy"] >= accuracy:
            if before is None:
                return float(point[cost])
            share = (accuracy - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return float(before[cost] + share * (point[cost] - before[cost]))
        before = point
    return None


def ratios(arms: Mapping[str, Any]) -> dict[str, float | None]:
    """Cost of each arm to reach full OPD's final accuracy over full OPD's whole cost.

    The same with full OPD of the same loss for the arms that stop in flight. Median over seeds of
    runs that lie next to each other in time; None where not every seed got there.
    """
    compared = [(name, REFERENCE[arm["pair"]]) for name, arm in arms.items()]
    found: dict[str, float | None] = {}
    for name, reference in [*compared, *SAME_LOSS]:
        if name == reference or name not in arms or reference not in arms:
            continue
        goal = over_seeds(arms[reference], "accuracy").mean
        whole = {record["seed"]: record for record in arms[reference]["seeds"]}
        label = "opd" if reference in REFERENCE.values() else reference
        for cost, short in (("generated_tokens", "tokens"), ("wall_s", "wall")):
            shares = [
                None
                if (reached := cost_to_reach(record, goal, cost)) is None
                else reached / whole[record["seed"]][cost]
                for record in arms[name]["seeds"]
                if record["seed"] in whole
            ]
            complete = [share for share in shares if share is not None]
            is_complete = bool(shares) and len(complete) == len(shares)
            key = f"{name}_{short}_to_{label}_accuracy_over_{label}_{short}"
            found[key] = round(median(complete), 4) if is_complete else None
    return found


def digest(arm: Arm, steps: int) -> str:
    """Changes whenever a setting or the student of an arm does."""
    weights = arm.pair.student / "model.safetensors"
    parts: list[bytes] = [
        BASE_CONFIG.read_bytes(),
        json.dumps(arm.changes, sort_keys=True).encode(),
        str(steps).encode(),
        weights.read_bytes() if weights.is_file() else b"",
    ]
    return sha256(b"\0".join(parts)).hexdigest()[:16]


def describe(values: Spread, form: Callable[[float], str]) -> str:
    """`mean ± deviation`."""
    if values.deviation is None:
        return form(values.mean)
    return f"{form(values.mean)} ± {form(values.deviation)}"
