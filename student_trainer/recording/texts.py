"""The texts of a run: responses as they are sampled, and side by side before and after.

samples/rollouts.jsonl has some rollouts of every step, samples/evaluations.jsonl the responses of
every evaluation: a SampleText a line, with the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from student_trainer.diagnostics.alarms import Alarm
from student_trainer.diagnostics.step_report import EvalReport, SampleText, StepReport
from student_trainer.recording.json_lines import SAMPLES_FOLDER, read_lines

ROLLOUTS_FILE = "rollouts.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
SIDE_BY_SIDE_FILE = "samples.md"


class Texts:
    """A sink of both files."""

    def __init__(self, folder: Path, *, append: bool) -> None:
        folder = folder / SAMPLES_FOLDER
        folder.mkdir(exist_ok=True)
        mode = "a" if append else "w"
        self._rollouts = (folder / ROLLOUTS_FILE).open(mode, encoding="utf-8")
        self._evaluations = (folder / EVALUATIONS_FILE).open(mode, encoding="utf-8")

    def step(self, report: StepReport) -> None:
        _write(self._rollouts, report.step, report.samples)

    def evaluation(self, report: EvalReport) -> None:
        _write(self._evaluations, report.step, report.samples)

    def alarm(self, step: int, alarm: Alarm) -> None:
        """No text of the student's."""

    def close(self) -> None:
        self._rollouts.close()
        self._evaluations.close()


def _write(file: IO[str], step: int, samples: Sequence[SampleText]) -> None:
    for sample in samples:
        line = {"step": step, **asdict(sample)}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, drawn alike by the first and the last weights."""

    before: SampleText
    after: SampleText


def pairs(folder: Path, *, count: int, seed: int = 0, notes: list[str] | None = None) -> list[Pair]:
    """So many pairs of the first and the last evaluation, drawn by the seed and not chosen; fewer
    where there are fewer, none before there are two evaluations.

    Raises DatasetError for a broken line; with `notes` a last one that is not whole is left out and
    told of there.
    """
    path = folder / SAMPLES_FOLDER / EVALUATIONS_FILE
    written = read_lines(path, notes) if path.is_file() else []
    steps = sorted({line["step"] for line in written})
    if len(steps) < 2:
        return []
    first, last = (
        {_place(line): line for line in written if line["step"] == step}
        for step in (steps[0], steps[-1])
    )
    both = [place for place in first if place in last]
    drawn = np.random.default_rng(seed).permutation(len(both))[:count]
    return [Pair(_sample(first[both[i]]), _sample(last[both[i]])) for i in sorted(drawn.tolist())]


def write_side_by_side(folder: Path, drawn: Sequence[Pair]) -> Path:
    """samples.md in the run's folder."""
    path = folder / SIDE_BY_SIDE_FILE
    path.write_text("\n".join(_markdown(drawn)) + "\n", encoding="utf-8")
    return path


def _markdown(drawn: Sequence[Pair]) -> Iterator[str]:
    yield "# Held-out responses, first and last evaluation\n"
    yield f"{len(drawn)} pairs, drawn by seed.\n"
    for pair in drawn:
        yield f"## {pair.before.prompt_id}\n"
        yield f"{_quoted(pair.before.prompt)}\n"
        for name, sample in (("before", pair.before), ("after", pair.after)):
            yield f"**{name}** ({_about(sample)})\n"
            yield f"{_quoted(sample.response)}\n"


def _about(sample: SampleText) -> str:
    parts = [f"{sample.tokens} tokens", sample.finish]
    if sample.correct is not None:
        parts.append("right" if sample.correct else "wrong")
    if sample.teacher_logprob is not None:
        parts.append(f"teacher {sample.teacher_logprob:.2f} nats a token")
    return ", ".join(parts)


def _quoted(text: str) -> str:
    """As a block that Markdown leaves alone, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _place(line: dict[str, object]) -> tuple[object, ...]:
    return line.get("prompt_id"), line.get("sample"), line.get("temperature")


def _sample(line: dict[str, object]) -> SampleText:
    values = {name: value for name, value in line.items() if name != "step"}
    return SampleText(**values)  # type: ignore[arg-type]
