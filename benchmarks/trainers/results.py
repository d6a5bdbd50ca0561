"""What runs come to: medians by phase, ratios, a table, a file. Knows no trainer.

A record of a run is what `running.run` returns, with `heldout`: figures by the step after which the
student was saved. The first step of a run counts for nothing but the way to a held-out level, and
one beside which others computed for nothing at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import Measured, Sample
from benchmarks.provenance import provenance
from student_trainer.process.writing import write_whole

Run = dict[str, Any]
BEFORE = "0"
"""Key of the untrained student among held-out figures."""
MIB = 2**20
TRLS = ("trl", "trl_static", "trl_vllm")
MODES = {"trl": "trl_default", "trl_static": "trl_static"}
"""What the ratios call single modes of TRL; `trl` is the fastest."""
UNASKED = ("driftline", "driftline_stop")
"""Of our arms those whose ratios are there, empty, where they were not run."""
KL_ARMS = {
    "driftline_stop": "driftline",
    "driftline": "driftline_unstopped",
    "driftline_updates": "driftline_updates",
}
"""Of ours, the arms held against TRL's level, and what the ratios call them."""
PHASES = ("generate", "teacher", "loss", "backward", "learn", "update", "sync", "other")


class Results:
    """The result file as it grows: written after every run and every held-out measurement."""

    def __init__(self, path: Path, quiet_cores: float) -> None:
        """Goes on from the file, if there is one. A step counts where others had no more than
        `quiet_cores` of the machine, in runs of before as well."""
        self.path, self.quiet_cores = path, quiet_cores
        self.runs: dict[str, list[Run]] = {}
        self.errors: dict[str, str] = {}
        """Of arms that could not do their work."""
        self.before: dict[str, dict[str, float]] = {}
        """Held-out figures of each pair's untrained student."""
        if path.exists():
            written = json.loads(path.read_text(encoding="utf-8"))
            self.before, self.errors = written["before"], written["failed"]
            self.runs = {
                name: [run | {"quiet_cores": quiet_cores} for run in arm["runs"]]
                for name, arm in written["arms"].items()
            }

    def has(
        self, name: str, number: int, digest: str, commit: str, *, mostly_quiet: bool = False
    ) -> bool:
        """Whether this round of an arm is there, of the same work and code; and with at least half
        of its steps but the first quiet, if it must be."""
        key = (number, digest, commit)
        return any(
            (run["round"], run["of"], run["commit"]) == key
            and (not mostly_quiet or 2 * len(counted(run)) >= len(run["steps"]) - 1)
            for run in self.runs.get(name, [])
        )

    def add(self, name: str, run: Run) -> None:
        """In place of what was there of the same round, and of runs of other code or length."""
        run = run | {"quiet_cores": self.quiet_cores}
        kept = [r for r in self.runs.get(name, []) if r["round"] != run["round"] and _alike(r, run)]
        self.runs[name] = sorted([*kept, run], key=lambda r: int(r["round"]))
        self.errors.pop(name, None)

    def fail(self, name: str, error: str) -> None:
        """An arm that could not do its work; it stays in the table."""
        self.runs.setdefault(name, [])
        self.errors[name] = error

    def measured(self, descriptions: Mapping[str, str]) -> dict[str, Measured]:
        """Every arm: a sample a counted step."""
        return {
            name: measured(
                runs, descriptions.get(name.partition("/")[2], ""), self.errors.get(name)
            )
            for name, runs in self.runs.items()
        }

    def write(self, descriptions: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        arms = self.measured(descriptions)
        content = {
            "made": provenance(),
            "settings": dict(settings),
            "ratios": ratios(self.runs, self.errors),
            "before": self.before,
            "failed": self.errors,
            "arms": {name: arm.record() | {"runs": self.runs[name]} for name, arm in arms.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


def _alike(one: Run, other: Run) -> bool:
    return one["commit"] == other["commit"] and len(one["steps"]) == len(other["steps"])


def quiet(run: Run, step: Mapping[str, Any]) -> bool:
    """Whether others had no more of the machine beside a step than its run was to bear."""
    return bool(step["others_cores"] <= run["quiet_cores"])


def counted(run: Run) -> list[dict[str, Any]]:
    """The steps of a run that count: the quiet ones but for the first of all."""
    return [step for step in run["steps"][1:] if quiet(run, step)]


def measured(runs: Sequence[Run], description: str, error: str | None) -> Measured:
    """A sample a counted step; figures of a whole run stand in the first of its samples."""
    samples: list[Sample] = []
    if runs and not error and not any(counted(run) for run in runs):
        error = f"no step beside which others had at most {runs[0]['quiet_cores']} cores"
    for run in runs:
        of_run = figures_of_run(run)
        for step in counted(run):
            phases = {f"{name}_s": seconds for name, seconds in step["phases"].items()}
            told = ("generated_tokens", "prompt_tokens", "others_cores")
            tokens = {name: float(step[name]) for name in told}
            samples.append(Sample(seconds=step["seconds"], figures=phases | tokens | of_run))
            of_run = {}
    return Measured(description=description, samples=samples, error=error)


def figures_of_run(run: Run) -> dict[str, float]:
    """Those that are there: seconds until the first token, peaks, the held-out divergence at the
    end."""
    found = {f"peak_{name}_mib": mib for name, mib in run["peak_mib"].items()}
    found |= {name: run[name] for name in ("ready_s", "others_cores_at_start")}
    if run["start_up_s"] is not None:
        found["start_up_s"] = run["start_up_s"]
    if (last := run.get("heldout", {}).get(str(len(run["steps"])))) is not None:
        found["heldout_reverse_kl"] = last["reverse_kl"]
    return found


def ratios(runs: Mapping[str, list[Run]], errors: Mapping[str, str]) -> dict[str, float | None]:
    """TRL's fastest mode over ours, by pair; None where either has failed or is not there."""
    whole = {
        name: some
        for name, some in runs.items()
        if name not in errors and any(counted(run) for run in some)
    }
    found: dict[str, float | None] = {}
    for pair in sorted({name.partition("/")[0] for name in runs}):
        of_pair = {n.partition("/")[2]: r for n, r in whole.items() if n.startswith(f"{pair}/")}
        trl = _fastest(of_pair, TRLS)
        for ours in dict.fromkeys((*UNASKED, *of_pair)):
            if ours in TRLS:
                continue
            name = f"{ours}_{pair}"
            pairs = (of_pair.get(trl or ""), of_pair.get(ours))
            found[f"trl_step_over_{name}"] = _over(*pairs, step_s)
            for mode, words in MODES.items():
                found[f"{words}_step_over_{name}"] = _over(of_pair.get(mode), pairs[1], step_s)
            found[f"trl_start_up_over_{name}"] = _over(*pairs, start_up_s)
            found[f"trl_peak_over_{name}"] = _over(*pairs, peak_mib)
            found[f"trl_peak_without_teacher_over_{name}"] = _over(*pairs, peak_without_teacher_mib)
            found[f"sync_share_{name}"] = _share(of_pair.get(ours), "sync")
    for pair, suffix in (("playground", ""), ("smollm2", "_smollm2")):
        of_pair = {n.partition("/")[2]: r for n, r in whole.items() if n.startswith(f"{pair}/")}
        trl = _fastest(of_pair, TRLS)
        if trl is None:
            continue
        for ours, name in KL_ARMS.items():
            for key, with_start in (("", False), ("_with_start_up", True)):
                found[f"trl_seconds_to_same_kl{key}_over_{name}{suffix}"] = _to_same_level(
                    of_pair[trl], of_pair.get(ours, []), with_start_up=with_start
                )
    return {name: None if v is None else round(v, 4) for name, v in found.items()}


def _fastest(arms: Mapping[str, list[Run]], names: Sequence[str]) -> str | None:
    there = [name for name in names if name in arms]
    return min(there, key=lambda name: step_s(arms[name]), default=None)


def _over(over: list[Run] | None, under: list[Run] | None, of: Any) -> float | None:
    if not over or not under:
        return None
    upper, lower = of(over), of(under)
    return None if upper is None or not lower else float(upper / lower)


def step_s(runs: Sequence[Run]) -> float:
    """Median seconds of a counted step."""
    return float(median(step["seconds"] for run in runs for step in counted(run)))


def start_up_s(runs: Sequence[Run]) -> float | None:
    """Median seconds from the command to the first generated token."""
    known = [run["start_up_s"] for run in runs if run["start_up_s"] is not None]
    return median(known) if known else None


def peak_mib(runs: Sequence[Run]) -> float:
    """Median over runs of the trainer's peak; of TRL's the teacher is in it."""
    return float(median(run["peak_mib"]["trainer"] for run in runs))


def peak_without_teacher_mib(runs: Sequence[Run]) -> float:
    """The same without the weights of a teacher that is in the process."""
    weights = runs[0]["settings"].get("teacher_weight_bytes", 0)
    return peak_mib(runs) - float(weights) / MIB


def _share(runs: list[Run] | None, phase: str) -> float | None:
    """Of the seconds of counted steps, in a phase."""
    if not runs:
        return None
    steps = [step for run in runs for step in counted(run)]
    return float(sum(s["phases"].get(phase, 0.0) for s in steps) / sum(s["seconds"] for s in steps))


def undisturbed(run: Run) -> list[float]:
    """Seconds of every step; of one that was not quiet, the mean of the nearest quiet ones before
    and after it. Empty where none was."""
    steps = run["steps"]
    calm = [place for place, step in enumerate(steps) if quiet(run, step)]
    found = []
    for place in range(len(steps)) if calm else ():
        before = [p for p in calm if p <= place][-1:]
        after = [p for p in calm if p >= place][:1]
        nearest = {*before, *after}
        found.append(sum(float(steps[p]["seconds"]) for p in nearest) / len(nearest))
    return found


def seconds_to(run: Run, level: float) -> float | None:
    """Seconds of its steps, the first included, until its held-out reverse KL is at a level.

    The divergence is taken to be straight between the steps at which it was measured. None for a
    run that was never there.
    """
    wall = [0.0, *accumulate(undisturbed(run))]
    if len(wall) == 1:
        return None
    curve = sorted((int(step), float(f["reverse_kl"])) for step, f in run["heldout"].items())
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value <= level:
            if before is None or value == before[1]:
                return wall[step]
            part = (before[1] - level) / (before[1] - value)
            return before[0] + part * (wall[step] - before[0])
        before = (wall[step], value)
    return None


def _to_same_level(trl: list[Run], ours: list[Run], *, with_start_up: bool) -> float | None:
    """Median over rounds of TRL's seconds to its end over ours to the same divergence."""
    found = []
    for theirs in trl:
        same = [run for run in ours if run["round"] == theirs["round"]]
        last = str(len(theirs["steps"]))
        if not same or last not in theirs.get("heldout", {}) or not same[0].get("heldout"):
            continue
        level = theirs["heldout"][last]["reverse_kl"]
        needed = seconds_to(same[0], level)
        if needed is None:
            return None
        spent = sum(undisturbed(theirs))
        if with_start_up:
            starts = start_up_s(trl), start_up_s(ours)
            if starts[0] is None or starts[1] is None:
                return None
            spent, needed = spent + starts[0], needed + starts[1]
        found.append(spent / needed)
    return median(found) if found else None
