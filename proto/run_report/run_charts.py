"""What the steps of runs show: a curve a run, and where one run alone has more to say, its own
picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from run_report.curves import CURVES, MARKED_BELOW, OF_SEVERAL, Runs, curve_chart, weights_chart
from run_report.drawing import (
    BAD,
    GOOD,
    MUTED,
    SERIES,
    STOPPED,
    Chart,
    legend,
    legend_above,
    plain,
    say,
)
from run_report.figures import Bands, RunFigures
from run_report.savings import TRUNCATED, spent_by_step

UNKNOWN = "unknown"
PHASES = {
    "generate": ("generate", SERIES[0]),
    "teacher_wait": ("teacher wait", SERIES[4]),
    "learn": ("learn", SERIES[2]),
    "sync": ("sync", SERIES[1]),
}
FINISHES = {
    "stop": ("ended by the student", SERIES[2]),
    "length": ("by the budget", SERIES[0]),
    TRUNCATED: ("stopped in flight", STOPPED),
    "unscored": ("not scored", SERIES[5]),
    UNKNOWN: ("not said", MUTED),
}
MAX_POINTS = 4000
"""Of a cloud; of more a part is drawn, by a fixed seed."""


def ended(finish: str) -> str:
    """One of FINISHES; what others call an end says nothing here."""
    return finish if finish in FINISHES else UNKNOWN


def run_charts(runs: Runs) -> list[Chart]:
    """Those that the runs have figures for."""
    found = [chart for chart in _curves(runs) if chart is not None]
    for number, run in enumerate(runs):
        suffix = f"-{number + 1}" if len(runs) > 1 else ""
        of = f": {run.name}" if len(runs) > 1 else ""
        found += _of_one(run, suffix, of)
    return found


def _curves(runs: Runs) -> Iterator[Chart | None]:
    yield from (curve_chart(runs, curve) for curve in CURVES)
    yield weights_chart(runs)
    if len(runs) > 1:
        yield from (curve_chart(runs, curve) for curve in OF_SEVERAL)
        yield _seconds_of_all(runs)


def _of_one(run: RunFigures, suffix: str, of: str) -> Iterator[Chart]:
    """The pictures that hold one run each."""
    made: list[tuple[str, str, str, Callable[[Axes], None]]] = []
    bands = {step: p.bands for step, p in run.profiles.items() if p.bands is not None}
    if bands:
        made += [
            ("overlap-by-position", "Overlap by position, over the steps",
             "Dark is little in common; the scale goes from the lowest to the highest value. Where "
             "less than a tenth of the rollouts came, nothing is drawn.", partial(_heat, run)),
            ("overlap-first-last", "Overlap by position, first and last step",
             "The axis goes as far as the values do.", partial(_first_and_last, bands)),
        ]  # fmt: skip
    if run.heldout:
        made.append((
            "overlap-heldout", "Overlap by position, held out", "Of responses to held-out "
            "problems.", partial(_first_and_last, run.heldout),
        ))  # fmt: skip
    if run.profiles:
        made += [
            ("length-cloud", "Lengths and truncation points", "A point a rollout: tokens kept.",
             partial(_cloud, run)),
            ("ends", "How rollouts ended", "Share of a step's rollouts.",
             partial(_ends, run)),
            ("tokens", "Tokens spent and saved", "Summed over the steps; the two upper lines are "
             "what the run would have generated had nothing been stopped, see below.",
             partial(_tokens, run)),
        ]  # fmt: skip
    if len(run.series("seconds_learn")[0]):
        caption = "Wall seconds of a step by phase."
        made.append(("time", "Where the time went", caption, partial(_time, run)))
    for name, title, caption, draw in made:
        yield Chart(name=f"{name}{suffix}", title=f"{title}{of}", caption=caption, draw=draw)


def _heat(run: RunFigures, axis: Axes) -> None:
    bands = {step: p.bands for step, p in sorted(run.profiles.items()) if p.bands is not None}
    columns = [of_step.shown() for of_step in bands.values()]
    steps, width = list(bands), next(iter(bands.values())).width
    shares = np.full((max(1, *map(len, columns)), len(steps)), np.nan)
    for number, column in enumerate(columns):
        shares[: len(column), number] = column
    image = axis.imshow(
        shares, origin="lower", aspect="auto", interpolation="nearest", cmap="viridis",
        extent=(steps[0] - 0.5, steps[-1] + 0.5, 0, len(shares) * width),
    )  # fmt: skip
    axis.grid(False)
    axis.set(xlabel="step", ylabel="response token")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(image, ax=axis, pad=0.02, label="overlap")


def _first_and_last(bands: Mapping[int, Bands], axis: Axes) -> None:
    axis.set(xlabel="response token", ylabel="overlap")
    steps = sorted(bands)
    for step, color in {steps[0]: MUTED, steps[-1]: SERIES[0]}.items():
        overlaps = bands[step].shown()
        middles = (np.arange(len(overlaps)) + 0.5) * bands[step].width
        axis.plot(middles, overlaps, ".-", color=color, label=f"step {step}")
    axis.margins(y=0.12)
    legend(axis)


def _cloud(run: RunFigures, axis: Axes) -> None:
    axis.set(xlabel="step", ylabel="tokens")
    rng = np.random.default_rng(0)
    rows = [
        (step, length, finish == TRUNCATED)
        for step, profile in run.profiles.items()
        for length, finish in zip(profile.lengths, profile.finish, strict=True)
    ]
    if len(rows) > MAX_POINTS:
        rows = [rows[i] for i in sorted(rng.permutation(len(rows))[:MAX_POINTS].tolist())]
    for stopped, color, label in ((False, SERIES[0], "ran to its end"), (True, STOPPED, "stopped")):
        points = np.array([(step, length) for step, length, s in rows if s is stopped])
        if len(points):
            jitter = rng.uniform(-0.3, 0.3, len(points))
            axis.plot(
                points[:, 0] + jitter, points[:, 1], ".", ms=5, alpha=0.5, mew=0, color=color,
                label=label,
            )  # fmt: skip
    budgets = sorted(run.budgets.items())
    if budgets:
        axis.plot(*zip(*budgets, strict=True), color=MUTED, linewidth=1, label="budget")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axis, 3)


def _ends(run: RunFigures, axis: Axes) -> None:
    steps = sorted(run.profiles)
    ends = [[ended(finish) for finish in run.profiles[step].finish] for step in steps]
    known = {finish for of_step in ends for finish in of_step}
    shares = [
        [of_step.count(finish) / max(1, len(of_step)) for of_step in ends]
        for finish in FINISHES
        if finish in known
    ]
    shown = [FINISHES[finish] for finish in FINISHES if finish in known]
    bottom = np.zeros(len(steps))
    for (label, color), share in zip(shown, shares, strict=True):
        axis.bar(steps, share, width=1.0 if len(steps) > MARKED_BELOW else 0.8, bottom=bottom,
                 color=color, alpha=0.85, linewidth=0, label=label)  # fmt: skip
        bottom += share
    axis.set(xlabel="step", ylabel="share", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(False)
    legend_above(axis, len(shown))


def _tokens(run: RunFigures, axis: Axes) -> None:
    spent = spent_by_step(run)
    steps = list(spent)
    generated = np.cumsum([s.generated for s in spent.values()])
    axis.plot(steps, np.cumsum([s.kept for s in spent.values()]), color=GOOD, label="kept")
    axis.plot(steps, generated, color=SERIES[0], label="generated")
    for values, style, label in (
        ([s.saved_likely for s in spent.values()], "--", "as long as the others"),
        ([s.saved_at_most for s in spent.values()], ":", "up to the budget"),
    ):
        there = [value for value in values if value is not None]
        if len(there) == len(values):
            axis.plot(steps, generated + np.cumsum(there), style, color=BAD, label=label)
    axis.set(xlabel="step", ylabel="tokens", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="upper left")


def _time(run: RunFigures, axis: Axes) -> None:
    steps = sorted(run.steps)
    values = [[run.steps[s].get(f"seconds_{phase}", 0.0) for s in steps] for phase in PHASES]
    labels = [label for label, _ in PHASES.values()]
    if len(steps) == 1:
        say(axis, f"one step: {sum(v[0] for v in values):.1f} s")
        return
    axis.stackplot(steps, values, labels=labels, colors=[c for _, c in PHASES.values()], alpha=0.85)
    highest = max(sum(at) for at in zip(*values, strict=True))
    axis.set(xlabel="step", ylabel="seconds", ylim=(0, 1.05 * highest or 1.0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axis, len(labels))


def _seconds_of_all(runs: Runs) -> Chart | None:
    """A bar a run; the phases of the runs beside each other."""
    if not any(len(run.series("seconds_learn")[0]) for run in runs):
        return None

    def draw(axis: Axes) -> None:
        left = np.zeros(len(runs))
        names = [plain(run.name) for run in runs]
        for phase, (label, color) in PHASES.items():
            seconds = np.array([run.series(f"seconds_{phase}")[1].sum() for run in runs])
            axis.barh(names, seconds, left=left, color=color, label=label, alpha=0.85)
            left += seconds
        axis.set(xlabel="seconds", ylim=(len(runs) - 0.4, -0.6))
        legend_above(axis, len(PHASES))

    return Chart(
        name="seconds",
        title="Time of the whole runs",
        caption="Wall seconds of all steps by phase.",
        draw=draw,
        height=1.4 + 0.4 * len(runs),
    )
