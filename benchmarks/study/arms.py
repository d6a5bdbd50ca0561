"""The arms of the study: what each changes of the settings that all share (`base.toml`), and why.

Nothing here was tuned for one arm. Lengths that a paper gives in tokens are scaled from its longest
response to ours, and changes a step from its number of steps to ours; see docs/study.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT

CHECKPOINTS = ROOT / "examples" / "playground" / "checkpoints"
BASE_CONFIG = Path(__file__).with_name("base.toml")

SAMPLED = {"loss.kind": "sampled_reverse_kl"}
TOPK = {"loss.kind": "student_topk_reverse_kl"}
LSM = {"loss.kind": "local_support_matching", "teacher.k": 32}
NOT_RENORMALISED = {"loss": {"kind": "truncated_reverse_kl", "tail": False}, "teacher.k": 32}
TOP_P = {
    "rollout.top_p": 0.9,
    # Under top-p the student's own top-k beyond its nucleus is arbitrary and is not sent.
    "rollout.student_topk": 0,
    # The whole section: what the base sets for overlaps, this metric does not read.
    "drift": {
        "metric": "teacher_top_p_accept",
        "k": 3,
        "w_drop": 0.25,
        "stop_in_flight": False,
    },
}
STOP = {"drift.stop_in_flight": True}
PRUNE_WEIGHT = {"weights.prune.w_base": 0.5}
# Prune-OPD: 2048, 1024, 100 and 100 of 12288 tokens, over 203 steps; here of 432 over 12.
PRUNE_BUDGET = {
    "budget": {
        "kind": "prune",
        "initial": 72,
        "minimum": 36,
        "maximum": 432,
        "increment": 60,
        "margin": 4,
    }
}
REUSE = {"optim.epochs": 3}


def _gate(granularity: str) -> dict[str, Any]:
    # 64 of 16384 tokens would be one token here; 16 leaves 16 blocks of a right response.
    size = {"weights.block_gate.block_size": 16} if granularity == "block" else {}
    return {"weights.block_gate.granularity": granularity, **size}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A student and what it starts from, next to the playground's teacher."""

    name: str
    student: Path
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    pair: Pair
    label: str
    """As it stands in tables and plots."""
    changes: dict[str, Any]
    """Setting -> value, on top of the base; what `student-trainer train --set` takes."""

    @property
    def overrides(self) -> list[str]:
        """The changes as `section.key=value`."""
        return [f"{key}={json.dumps(value)}" for key, value in self.changes.items()]


LOW = Pair(
    name="low",
    student=CHECKPOINTS / "student",
    what="cold-started on five lines and a taste of whole problems: three in four rollouts drift",
)
HIGH = Pair(
    name="high",
    student=CHECKPOINTS / "student-near",
    what="the same student after more whole problems: few rollouts drift",
)


def _low(name: str, label: str, *changes: dict[str, Any]) -> Arm:
    return Arm(name=name, pair=LOW, label=label, changes=_joined(changes))


def _high(name: str, label: str, *changes: dict[str, Any]) -> Arm:
    return Arm(name=f"high_{name}", pair=HIGH, label=label, changes=_joined(changes))


def _joined(changes: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for change in changes:
        joined |= change
    return joined


def _cutoff(max_tokens: int) -> dict[str, Any]:
    return {"budget": {"kind": "fixed", "max_tokens": max_tokens}}


PROGRESSIVE = {
    "budget": {
        "kind": "progressive",
        "initial": 108,
        "maximum": 432,
        "increment": 27,
        "every_steps": 1,
    }
}

ARMS = (
    _low("opd", "full OPD, sampled token", SAMPLED),
    _low("topk", "full OPD, student top-k", TOPK),
    _low("topk_stop", "top-k, in-flight stop", TOPK, STOP),
    _low("opd_stop", "sampled token, in-flight stop", SAMPLED, STOP),
    _low("prune_batch", "Prune-OPD, batch controller", TOPK, PRUNE_WEIGHT, PRUNE_BUDGET),
    _low("prune_stop", "Prune-OPD weights, in-flight stop", TOPK, PRUNE_WEIGHT, STOP),
    _low("prune_both", "Prune-OPD, controller and stop", TOPK, PRUNE_WEIGHT, PRUNE_BUDGET, STOP),
    _low("first30", "first 30 % only", SAMPLED, {"weights.position_window.end_share": 0.3}),
    _low("last30", "last 30 % only", SAMPLED, {"weights.position_window.start_share": 0.7}),
    _low("cutoff25", "fixed cut-off at 25 %", SAMPLED, _cutoff(108)),
    _low("cutoff50", "fixed cut-off at 50 %", SAMPLED, _cutoff(216)),
    _low("progressive", "progressive horizon", SAMPLED, PROGRESSIVE),
    _low("iw", "IW-OPD", SAMPLED, {"weights.prefix_importance.gamma": 0.5}),
    _low("lsm", "LSM (top-p 0.9)", LSM, TOP_P),
    _low("lsm_no_top_p", "LSM, no top-p", LSM),
    _low("lsm_no_renorm", "LSM, not renormalised", NOT_RENORMALISED, TOP_P),
    _low("lsm_neither", "LSM, neither", NOT_RENORMALISED),
    _low("reuse", "3 epochs, no gate", SAMPLED, REUSE),
    _low("reuse_block", "3 epochs, block gate", SAMPLED, REUSE, _gate("block")),
    _low("reuse_token", "3 epochs, token gate", SAMPLED, REUSE, _gate("token")),
    _low("reuse_sequence", "3 epochs, sequence gate", SAMPLED, REUSE, _gate("sequence")),
    _high("opd", "full OPD, sampled token", SAMPLED),
    _high("topk", "full OPD, student top-k", TOPK),
    _high("topk_stop", "top-k, in-flight stop", TOPK, STOP),
    _high("prune_batch", "Prune-OPD, batch controller", TOPK, PRUNE_WEIGHT, PRUNE_BUDGET),
    _high("prune_both", "Prune-OPD, controller and stop", TOPK, PRUNE_WEIGHT, PRUNE_BUDGET, STOP),
)

QUICK = ("opd", "topk", "topk_stop", "prune_both", "lsm")
"""What --quick runs, one seed each."""


def by_name(names: list[str]) -> list[Arm]:
    """The arms of these names, in the order of ARMS. Raises ValueError for an unknown one."""
    known = [arm.name for arm in ARMS]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no arm {', '.join(unknown)}; there are {', '.join(known)}")
    return [arm for arm in ARMS if arm.name in names]
