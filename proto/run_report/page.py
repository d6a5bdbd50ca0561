"""The page: everything of a report in one HTML file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from run_report.drawing import Chart
from run_report.excerpts import Excerpts, excerpts
from run_report.figures import RunFigures, Warned
from run_report.rollout_charts import TokenShare, rollout_charts, token_shares
from run_report.run_charts import run_charts
from run_report.savings import Spent, seconds_saved, spent_by_step, total
from run_report.sparklines import Small, small_multiples

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPart:
    """What is shown of the rollouts of one run."""

    run: str
    about: str
    """Which they are."""
    means: Sequence[tuple[str, str]]
    """Of what is known of all of them."""
    charts: Sequence[Chart]
    measure: str
    """What `shares` are of."""
    shares: Sequence[TokenShare]
    excerpts: Excerpts


@dataclass(frozen=True, slots=True, kw_only=True)
class SpentPart:
    """Tokens and time of one run."""

    run: str
    spent: Spent
    seconds: float | None
    seconds_saved: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything on the page, put together and not drawn yet."""

    title: str
    runs: Sequence[RunFigures]
    key_figures: Sequence[tuple[str, Sequence[str]]]
    charts: Sequence[Chart]
    spent: Sequence[SpentPart]
    rollouts: Sequence[RolloutPart]
    small: Mapping[str, Sequence[Small]]
    settings: Sequence[tuple[str, Sequence[str]]]
    """Names and, by run, values: of several runs those that differ."""

    @property
    def warnings(self) -> list[tuple[str, Warned]]:
        """Every warning, with the run's name."""
        return [(run.name, warned) for run in self.runs for warned in run.warnings]

    @property
    def all_charts(self) -> list[Chart]:
        """Those of the steps and those of the rollouts."""
        return [*self.charts, *(chart for part in self.rollouts for chart in part.charts)]

    def html(self) -> str:
        """The page. What comes from runs and rollouts is text in it, whatever it holds."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            undefined=StrictUndefined,
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
        environment.filters["svg"] = lambda chart: Markup(chart.svg())
        return environment.get_template(TEMPLATE).render(report=self)

    def write(self, path: Path) -> Path:
        """Whole or not at all. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self.html(), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def save_charts(self, folder: Path) -> list[Path]:
        """A PNG file of every picture. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        return [chart.save(folder) for chart in self.all_charts]


KEY_FIGURES = (
    ("right answers, held out", "eval", "accuracy", ".1%"),
    ("reverse KL, held out", "eval", "heldout_reverse_kl", ".3f"),
    ("reverse KL of rollouts", "step", "reverse_kl", ".3f"),
    ("overlap", "step", "overlap", ".3f"),
    ("tokens a response", "step", "length_mean", ".0f"),
    ("stopped in flight", "step", "truncation_rate", ".0%"),
    ("gradient norm", "step", "grad_norm", ".3g"),
)
"""First and last of each: label, whose, name, format."""


def report(runs: Sequence[RunFigures], title: str) -> Report:
    """Of one run or several, beside and over each other."""
    parts = [
        _rollout_part(run, f"-{number}" if len(runs) > 1 else "")
        for number, run in enumerate(runs, 1)
    ]
    return Report(
        title=title,
        runs=runs,
        key_figures=_key_figures(runs),
        charts=run_charts(runs),
        spent=[_spent_part(run) for run in runs if run.profiles],
        rollouts=[part for part in parts if part is not None],
        small=small_multiples(runs),
        settings=_settings(runs),
    )


def _key_figures(runs: Sequence[RunFigures]) -> list[tuple[str, list[str]]]:
    rows = []
    for label, kind, name, form in KEY_FIGURES:
        cells = []
        for run in runs:
            _, values = run.series(name) if kind == "step" else run.evaluated(name)
            ends = [f"{value:{form}}" for value in (values[:1].tolist() + values[1:].tolist()[-1:])]
            cells.append(" → ".join(ends) or "-")
        if any(cell != "-" for cell in cells):
            rows.append((label, cells))
    steps = [str(len(run.steps)) if run.steps else "-" for run in runs]
    if any(run.steps for run in runs):
        rows.append(("steps learnt", steps))
    return rows


def _spent_part(run: RunFigures) -> SpentPart:
    spent = total(spent_by_step(run))
    seconds = sum(
        value for values in run.steps.values() for name, value in values.items()
        if name.startswith("seconds_")
    )  # fmt: skip
    likely = spent.saved_likely if spent.saved_likely is not None else spent.saved_at_most
    return SpentPart(
        run=run.name,
        spent=spent,
        seconds=seconds or None,
        seconds_saved=seconds_saved(run, likely),
    )


def _rollout_part(run: RunFigures, suffix: str) -> RolloutPart | None:
    """`suffix`: of the names of its pictures."""
    if run.rollouts is None or not len(run.rollouts):
        return None
    steps = sorted(set(run.rollouts.column("step").to_pylist()))
    of_steps = f" of step {_span(steps)}" if run.steps else ""
    measure, shares = token_shares(run.rollouts, run.pieces)
    return RolloutPart(
        run=run.name,
        about=f"{len(run.rollouts)} rollouts{of_steps}",
        means=_means(run.rollouts),
        charts=[replace(c, name=f"{c.name}{suffix}") for c in rollout_charts(run.rollouts)],
        measure=measure,
        shares=shares,
        excerpts=excerpts(run.rollouts, run.pieces),
    )


MEANS = (
    ("overlap", "mean_overlap", ".3f"),
    ("reverse KL", "mean_reverse_kl", ".3f"),
    ("the teacher's log-prob", "mean_teacher_logprob", ".3f"),
    ("tokens", "num_tokens", ".0f"),
    ("bad events", "num_bad_events", ".1f"),
    ("right answers", "correct", ".0%"),
)


def _means(rollouts: pa.Table) -> list[tuple[str, str]]:
    """Over rollouts, of those that have it."""
    found = []
    for label, name, form in MEANS:
        values = [value for value in rollouts.column(name).to_pylist() if value is not None]
        if values:
            found.append((label, f"{sum(values) / len(values):{form}}"))
    if rollouts.column("num_bad_events").null_count < len(rollouts):
        gone = len(rollouts) - rollouts.column("exhausted_at").null_count
        found.append(("R reached 0 in", f"{gone} of {len(rollouts)}"))
    return found


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])


def _settings(runs: Sequence[RunFigures]) -> list[tuple[str, list[str]]]:
    names = sorted({name for run in runs for name in run.settings})
    rows = [(name, [run.settings.get(name, "-") for run in runs]) for name in names]
    return [row for row in rows if len(runs) == 1 or len(set(row[1])) > 1]
