"""Figures over the steps: a curve a run, runs by colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from run_report.drawing import MUTED, SERIES, Chart, legend, plain
from run_report.figures import RunFigures

LOG_ABOVE = 30.0
"""A curve whose largest value is so many times its smallest is drawn by its logarithm."""
MARKED_BELOW = 40
"""A curve of fewer points has them marked."""
Runs = Sequence[RunFigures]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Figures whose values are drawn over the steps."""

    name: str
    title: str
    caption: str
    unit: str
    figures: Mapping[str, str]
    """Name -> what tells it from the others of the picture."""
    is_evaluated: bool = False

    def series(self, run: RunFigures, figure: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of one of them."""
        return run.evaluated(figure) if self.is_evaluated else run.series(figure)


CURVES = (
    Curve(
        name="accuracy",
        title="Right answers to held-out problems",
        caption="Share of greedy responses that have the right answer.",
        unit="accuracy",
        figures={"accuracy": ""},
        is_evaluated=True,
    ),
    Curve(
        name="heldout",
        title="Held-out divergence from the teacher",
        caption="Of sampled responses to held-out problems, mean over tokens; bars are standard "
        "errors.",
        unit="nats a token",
        figures={"heldout_reverse_kl": "reverse KL", "heldout_forward_kl": "forward KL"},
        is_evaluated=True,
    ),
    Curve(
        name="loss",
        title="Loss",
        caption="The objective, weights included. Of a policy-gradient loss the value says "
        "nothing, and those of different losses cannot be compared.",
        unit="loss",
        figures={"loss": ""},
    ),
    Curve(
        name="reverse-kl",
        title="Reverse KL of the rollouts",
        caption="log p_student - log p_teacher of the sampled tokens, mean of those that count.",
        unit="nats a token",
        figures={"reverse_kl": ""},
    ),
    Curve(
        name="grad-norm",
        title="Gradient norm",
        caption="Before clipping, mean over the updates of a step.",
        unit="norm",
        figures={"grad_norm": ""},
    ),
    Curve(
        name="overlap",
        title="Overlap of student and teacher",
        caption="Share of the leading entries that both have, mean over all tokens. High is not "
        "success: a loop has it too.",
        unit="overlap",
        figures={"overlap": ""},
    ),
    Curve(
        name="mass",
        title="Mass on the teacher's top-K",
        caption="What of the student's probability falls out of it has no gradient under local "
        "support matching.",
        unit="mass",
        figures={
            "student_mass_at_teacher_topk": "the student's",
            "teacher_mass_at_teacher_topk": "the teacher's",
        },
    ),
    Curve(
        name="budget",
        title="Budget and effective length",
        caption="The most tokens that the next rollouts may have, and the median of tokens before "
        "R reached 0.",
        unit="tokens",
        figures={"max_tokens": "budget", "effective_length_p50": "effective length"},
    ),
)
OF_SEVERAL = (
    Curve(
        name="lengths",
        title="Length of rollouts",
        caption="Tokens kept, mean of a step.",
        unit="tokens",
        figures={"length_mean": ""},
    ),
    Curve(
        name="truncated",
        title="Rollouts stopped in flight",
        caption="Share of a step's rollouts.",
        unit="share",
        figures={"truncation_rate": ""},
    ),
)
"""What one run alone shows in another way."""


def curve_chart(runs: Runs, curve: Curve) -> Chart | None:
    """A line for each run and figure: runs by colour, figures by dash. None without a value."""
    if not any(len(curve.series(run, figure)[0]) for run in runs for figure in curve.figures):
        return None

    def draw(axis: Axes) -> None:
        axis.set(xlabel="step", ylabel=curve.unit)
        drawn = [
            _line(axis, curve, run, figure, number, dash, named=len(runs) > 1)
            for number, run in enumerate(runs)
            for dash, figure in enumerate(curve.figures)
        ]
        for run in runs[:1]:
            for figure in curve.figures:
                if (reference := run.references.get(figure)) is not None:
                    axis.axhline(reference, color=MUTED, linestyle=":")
                    axis.annotate(
                        "the teacher", (0.02, reference), xytext=(0, -3), color=MUTED, va="top",
                        xycoords=("axes fraction", "data"), textcoords="offset points",
                    )  # fmt: skip
                    drawn.append(np.array([reference]))
        _scaled(axis, np.concatenate(drawn))
        legend(axis)

    return Chart(name=curve.name, title=curve.title, caption=curve.caption, draw=draw)


def _line(
    axis: Axes,
    curve: Curve,
    run: RunFigures,
    figure: str,
    number: int,
    dash: int,
    *,
    named: bool,
) -> NDArray[np.float64]:
    """One of them, the `dash`th of its picture, of run `number`; its values."""
    steps, values = curve.series(run, figure)
    if not len(steps):
        return values
    label = ", ".join(
        [plain(run.name)] * named + [curve.figures[figure]] * bool(curve.figures[figure])
    )
    style: dict[str, Any] = {
        "color": SERIES[(number if named else dash) % len(SERIES)],
        "linestyle": ("-", "--")[dash % 2] if named else "-",
        "label": label,
        "marker": "o" if len(steps) < MARKED_BELOW else "",
    }
    errors = dict(zip(*(a.tolist() for a in curve.series(run, f"{figure}_se")), strict=True))
    if errors:
        bars = [errors.get(step, 0.0) for step in steps.tolist()]
        axis.errorbar(steps, values, yerr=bars, capsize=3, **style)
    else:
        axis.plot(steps, values, **style)
    return values


def _scaled(axis: Axes, values: NDArray[np.float64]) -> None:
    """The axis of values: by the logarithm where they span much, whole steps below."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(values) and values.min() > 0 and values.max() > LOG_ABOVE * values.min():
        axis.set_yscale("log")
    else:
        axis.margins(y=0.12)


def weights_chart(runs: Runs) -> Chart | None:
    names = ("weight_min", "weight_mean", "weight_max")
    values = np.concatenate([run.series(name)[1] for run in runs for name in names])
    if (values == 1.0).all():  # there are none, or no weights
        return None

    def draw(axis: Axes) -> None:
        axis.set(xlabel="step", ylabel="weight")
        for number, run in enumerate(runs):
            color = SERIES[number % len(SERIES)]
            steps, mean = run.series("weight_mean")
            (_, low), (_, high) = run.series("weight_min"), run.series("weight_max")
            axis.plot(steps, mean, color=color, label=plain(run.name))
            if len(low) == len(mean) == len(high):
                axis.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        _scaled(axis, np.zeros(0))
        legend(axis)

    caption = "Position weights of the tokens that count, before normalisation: mean, and smallest "
    return Chart(name="weights", title="Weights", caption=f"{caption}to largest.", draw=draw)
