"""What came of it, for a person: a table, verdicts, overlap by position, texts side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from examples.language.measuring import at_positions_of
from student_trainer.recording.json_lines import read_run

NUM_PAIRS = 10
PAIRS_SEED = 0
BAND_TOKENS = 4
MIN_BAND_SHARE = 0.1
"""A band of positions is drawn when at least this share of the responses reaches it."""
WANTED_KL_SHARE = 0.5
ROWS = {
    "reverse_kl": "reverse KL to the teacher, nats a token",
    "forward_kl": "forward KL, nats a token",
    "teacher_logprob": "teacher's log-prob, nats a token",
    "overlap": "overlap of the 16 most likely",
    "same_first": "same first choice",
    "student_entropy": "entropy, nats",
    "length": "tokens of a response",
    "end_rate": "ended by itself",
    "repeated_rate": "repeated runs of four tokens",
    "repeated_alike": "the same, at the lengths of before",
    "loop_rate": "tokens in a loop",
}


Models = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""What was measured of the teacher, of the untrained and of the trained student."""


def with_rates_alike(teacher: Any, before: Any, after: Any) -> Models:
    """The same with `repeated_alike`: repetition at the lengths of the untrained student's answers.

    A text repeats more the longer it is, and the untrained student stops after a few words.
    """
    made = []
    for model in (teacher, before, after):
        groups = {}
        for group, figures in model["figures"].items():
            rate = at_positions_of(
                before["figures"][group]["responses_by_position"],
                figures["repeated_by_position"],
                figures["responses_by_position"],
            )
            groups[group] = {**figures, "repeated_alike": rate}
        made.append({**model, "figures": groups})
    return made[0], made[1], made[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One thing that the student should be better at, and whether it is."""

    claim: str
    before: float
    after: float
    teacher: float
    holds: bool

    def line(self) -> str:
        values = f"{self.before:.3f} -> {self.after:.3f} (teacher {self.teacher:.3f})"
        return f"{'yes' if self.holds else 'NO '}  {self.claim}: {values}"


def verdicts(
    teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> list[Verdict]:
    """On the figures of all prompts. A rate is better the nearer it is to the teacher's own."""

    def nearer(old: float, new: float, own: float) -> bool:
        return abs(new - own) < abs(old - own)

    tests: dict[str, tuple[str, Callable[[float, float, float], bool]]] = {
        "reverse_kl": (
            "held-out reverse KL has fallen by at least half",
            lambda old, new, own: new <= WANTED_KL_SHARE * old,
        ),
        "teacher_logprob": (
            "the teacher finds the answers more likely",
            lambda old, new, own: new > old,
        ),
        "end_rate": ("the share that ends by itself is nearer to the teacher's", nearer),
        "repeated_alike": (
            "it repeats itself less, at the lengths of before",
            lambda old, new, own: new < old,
        ),
    }
    found = []
    for name, (claim, test) in tests.items():
        values = [model["figures"]["all"][name] for model in (before, after, teacher)]
        old, new, own = values
        found.append(
            Verdict(claim=claim, before=old, after=new, teacher=own, holds=test(old, new, own))
        )
    return found


def table(**models: dict[str, Any]) -> Table:
    """Every figure of each, a column a model, by kind of prompt."""
    made = Table(title="held-out prompts", title_justify="left")
    made.add_column("")
    for name in models:
        made.add_column(name, justify="right", style="dim" if name == "teacher" else "")
    first = next(iter(models.values()))
    for group, figures in first["figures"].items():
        made.add_section()
        made.add_row(f"[bold]{group}[/] ({figures['num_responses']} responses)")
        for name, title in ROWS.items():
            values = [f"{model['figures'][group][name]:.3f}" for model in models.values()]
            made.add_row(title, *values)
    return made


def markdown(teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> str:
    """The table of docs/language.md."""
    lines = [
        "| held-out prompts | before | after | teacher |",
        "|---|---:|---:|---:|",
    ]
    for group in after["figures"]:
        of = [model["figures"][group] for model in (before, after, teacher)]
        lines.append(f"| **{group}** ({of[1]['num_responses']} responses) | | | |")
        for name, title in ROWS.items():
            values = [f"{figures[name]:.3f}" for figures in of]
            if name == "reverse_kl":
                values = [_with_error(figures[name], figures["reverse_kl_error"]) for figures in of]
            lines.append(f"| {title} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


def pairs(teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> str:
    """NUM_PAIRS prompts, drawn by seed, with both answers and the teacher's, as markdown."""
    texts = [model["texts"] for model in (before, after, teacher)]
    by_prompt = [{text["prompt_id"]: text for text in model} for model in texts]
    names = sorted(by_prompt[0])
    drawn = np.random.default_rng(PAIRS_SEED).permutation(len(names))[:NUM_PAIRS]
    lines = []
    for place in drawn:
        name = names[place]
        lines += [f"**{name}**: {_question(by_prompt[0][name]['prompt'])}", ""]
        lines += ["| | |", "|---|---|"]
        for title, model in zip(("before", "after", "teacher"), by_prompt, strict=True):
            text = model[name]
            end = "" if text["ended"] else " ..."
            lines.append(f"| {title} | {_in_a_cell(text['response'])}{end} |")
        lines.append("")
    return "\n".join(lines)


def _question(prompt: str) -> str:
    """What the user says in a prompt of SmolLM2's template."""
    return _in_a_cell(prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0])


def _in_a_cell(text: str) -> str:
    escaped = text.strip().replace("\\", "\\\\")
    for character in "|*_`<#":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped.replace("\n", "<br>")


def draw(
    path: Path, teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Overlap with the teacher by position, before and after."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, model, color in (("before", before, "#9aa5b1"), ("after", after, "#1f4e79")):
        overlaps = np.array(model["figures"]["all"]["overlap_by_position"])
        counts = np.array(model["figures"]["all"]["responses_by_position"])
        starts = np.arange(0, len(counts), BAND_TOKENS)
        enough = counts[starts] >= MIN_BAND_SHARE * counts[0]
        summed = np.add.reduceat(overlaps * counts, starts) / np.add.reduceat(counts, starts)
        middles = starts + np.minimum(BAND_TOKENS, len(counts) - starts) / 2
        axis.plot(middles[enough], summed[enough], ".-", color=color, label=name)
    axis.set(
        title="Overlap of the 16 most likely tokens with the teacher's",
        xlabel="response token",
        ylabel="overlap",
        ylim=(0, 1),
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def truncations(run: Path) -> str:
    """Rollouts that the teacher's verdict stopped, by step: the first and the last."""
    steps = [step.values() for step in read_run(run).steps]
    if not steps:
        return "no step was scored"
    first, last = steps[0], steps[-1]
    return (
        f"stopped in flight: {first['truncated_rollouts']} of {first['rollouts']} rollouts in the "
        f"first step, {last['truncated_rollouts']} of {last['rollouts']} in the last; bad events "
        f"{first['bad_event_rate']:.0%} and {last['bad_event_rate']:.0%} of the tokens"
    )
