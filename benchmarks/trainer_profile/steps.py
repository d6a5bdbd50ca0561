"""What was seen of one step, and tables of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.trainer_profile.clocks import Clocks, Ran

SLICES = 10
"""Of a phase, for what goes on over time."""
LOOP, LOOP_THREAD = "rollouts", "the loop of rollouts"
RATE_SIZE, RATE_TIMES = 2048, 8


@dataclass(slots=True, kw_only=True)
class Phase:
    """One stretch of a step."""

    name: str
    seconds: float
    ran: dict[str, float] = field(default_factory=dict)
    """Processor seconds by process and kind of thread."""
    waited: dict[str, float] = field(default_factory=dict)
    """Seconds that they could have run and no core was free."""
    by_core: dict[str, float] = field(default_factory=dict)
    """Processor seconds by core and process."""
    over_time: list[dict[str, float]] = field(default_factory=list)
    """Cores that each process kept busy, in each tenth."""


@dataclass(slots=True, kw_only=True)
class Step:
    """One step, or another answer."""

    seconds: float
    phases: list[Phase]
    parts: dict[str, float]
    """Seconds of the learner, by part."""
    generated: int
    kept: int

    @classmethod
    def of(cls, answer: Mapping[str, Any], clocks: Clocks) -> Step:
        """From what a trainer says, and what its processes were seen to do."""
        called = {int(thread): name for thread, name in answer["threads"].items()}

        def whose(process: int, thread: int, _: Ran) -> str:
            if thread == process:
                kind = "main thread"
            else:
                kind = LOOP_THREAD if called.get(thread) == LOOP else "other threads"
            return f"{clocks.names[process]}: {kind}"

        def process_of(process: int, _thread: int, _: Ran) -> str:
            return clocks.names[process]

        def core_of(process: int, _thread: int, ran: Ran) -> str:
            return f"core {ran.core}: {clocks.names[process]}"

        phases = []
        for name, start, end in answer["phases"]:
            spent = clocks.spent(start, end, whose)
            edges = [start + (end - start) * i / SLICES for i in range(SLICES + 1)]
            width = max((end - start) / SLICES, 1e-9)
            phases.append(
                Phase(
                    name=name,
                    seconds=end - start,
                    ran={who: ran for who, (ran, _) in spent.items()},
                    waited={who: waited for who, (_, waited) in spent.items()},
                    by_core={
                        who: ran for who, (ran, _) in clocks.spent(start, end, core_of).items()
                    },
                    over_time=[
                        {
                            who: ran / width
                            for who, (ran, _) in clocks.spent(*pair, process_of).items()
                        }
                        for pair in pairwise(edges)
                    ],
                )
            )
        return cls(
            seconds=answer["ended"] - answer["began"],
            phases=phases,
            parts=dict(answer["parts"]),
            generated=answer.get("generated", 0),
            kept=answer.get("kept", 0),
        )

    def phase(self, name: str) -> Phase | None:
        """None where it did not take place."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def record(self) -> dict[str, Any]:
        """As it stands in the file."""

        def rounded(figures: Mapping[str, float]) -> dict[str, float]:
            return {
                name: round(value, 3) for name, value in sorted(figures.items()) if value > 5e-4
            }

        return {
            "seconds": round(self.seconds, 3),
            "generated_tokens": self.generated,
            "kept_tokens": self.kept,
            "learner": rounded(self.parts),
            "phases": {
                phase.name: {
                    "seconds": round(phase.seconds, 3),
                    "ran_s": rounded(phase.ran),
                    "waited_for_a_core_s": rounded(phase.waited),
                    "by_core_s": rounded(phase.by_core),
                    "busy_cores_over_time": [rounded(part) for part in phase.over_time],
                }
                for phase in self.phases
            },
        }

    def __str__(self) -> str:
        told = [f"{phase.name} {phase.seconds:.2f} s" for phase in self.phases]
        busy = sum(sum(phase.ran.values()) for phase in self.phases)
        phases, tokens = ", ".join(told), self.generated
        return f"{self.seconds:.2f} s ({phases}), {busy:.2f} s on cores, {tokens} tokens"


def shown(title: str, steps: Sequence[Step]) -> list[Table]:
    """Medians: of the phases, by process, and of the learner's parts."""
    if not steps:
        return []
    asked = [step for step in steps if step.phase("idle") is None] or steps
    whole = median(step.seconds for step in asked) or 1.0
    table = Table(title=f"{title}: {whole:.2f} s", title_justify="left", pad_edge=False)
    for column in ("phase", "s", "share", "who", "on a core, s", "share", "waited for one, s"):
        table.add_column(column, justify="left" if column in ("phase", "who") else "right")
    for name in dict.fromkeys(phase.name for step in steps for phase in step.phases):
        phases = [phase for step in steps if (phase := step.phase(name)) is not None]
        seconds = median(phase.seconds for phase in phases)
        table.add_row(name, f"{seconds:.2f}", "" if name == "idle" else f"{seconds / whole:.0%}")
        for who in sorted({who for phase in phases for who in phase.ran}):
            ran = median(phase.ran.get(who, 0.0) for phase in phases)
            waited = median(phase.waited.get(who, 0.0) for phase in phases)
            if ran >= 0.01 * seconds or waited >= 0.01 * seconds:
                share = f"{ran / max(seconds, 1e-9):.0%}"
                table.add_row("", "", "", who, f"{ran:.2f}", share, f"{waited:.2f}")
        table.add_section()
    tables = [table]
    parts = sorted({part for step in steps for part in step.parts})
    if learned := [phase.seconds for step in steps if (phase := step.phase("learn")) is not None]:
        inside = Table(title="of it the learner", title_justify="left", pad_edge=False)
        for column in ("part", "s", "share of learn"):
            inside.add_column(column, justify="left" if column == "part" else "right")
        for part in parts:
            seconds = median(step.parts.get(part, 0.0) for step in steps if step.phase("learn"))
            inside.add_row(part, f"{seconds:.3f}", f"{seconds / median(learned):.1%}")
        tables.append(inside)
    return tables


def ratios(found: Mapping[str, Mapping[str, Sequence[Step]]]) -> dict[str, float]:
    """Medians of a phase, each arm over the first."""
    ratios: dict[str, float] = {}
    for pair, arms in found.items():
        first, *others = arms
        for name in ("rollout", "learn", "sync", "probe"):
            medians = {
                arm: median(seconds)
                for arm, steps in arms.items()
                if (seconds := [p.seconds for s in steps if (p := s.phase(name)) is not None])
            }
            ratios |= {
                f"{pair}_{name}_{arm}_over_{first}": round(medians[arm] / medians[first], 4)
                for arm in others
                if arm in medians and first in medians
            }
    return ratios


def matrix_rate() -> float:
    """GFLOP/s of a large float32 product on all cores that this process has."""
    import torch

    left, right = torch.randn(2, RATE_SIZE, RATE_SIZE)
    left @ right
    started = time.perf_counter()
    for _ in range(RATE_TIMES):
        left @ right
    return RATE_TIMES * 2 * RATE_SIZE**3 / (time.perf_counter() - started) / 1e9
