"""What recorded or scored rollouts show of themselves: by position, by length, by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from numpy.typing import NDArray

from run_report.drawing import SERIES, STOPPED, Chart, legend
from run_report.figures import MIN_BAND_SHARE, TokenPieces
from run_report.run_charts import FINISHES, ended

BANDS = 48
"""At most, of a position axis."""
MIN_BAND_TOKENS = 4
NUM_TOKENS_NAMED = 12
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ByPosition:
    """A column over the positions of all rollouts, band by band."""

    middles: Floats
    mean: Floats
    low: Floats
    """Lower quartile; NaN where too few rollouts came."""
    high: Floats


def by_position(table: pa.Table, name: str) -> ByPosition | None:
    """None where no rollout has the column."""
    lists = table.column(name).combine_chunks()
    there = [array for array in _arrays(lists) if array is not None and len(array)]
    if not there:
        return None
    longest = max(map(len, there))
    width = max(MIN_BAND_TOKENS, -(-longest // BANDS))
    enough = max(1.0, MIN_BAND_SHARE * len(there))
    rows = []
    for start in range(0, longest, width):
        parts = [array[start : start + width] for array in there if len(array) > start]
        if len(parts) < enough:
            break
        values = np.concatenate(parts)
        rows.append((start + width / 2, values.mean(), *np.quantile(values, (0.25, 0.75))))
    return ByPosition(*np.array(rows).T)


def _arrays(lists: pa.Array) -> Iterator[Floats | None]:
    """The cells of a column of lists."""
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    lengths = pc.list_value_length(lists).to_pylist()
    start = 0
    for length in lengths:
        yield None if length is None else flat[start : start + length]
        start += length or 0


def rollout_charts(table: pa.Table) -> list[Chart]:
    """Those that the rollouts have columns for."""
    found = []
    for name, column, title, unit, caption in (
        ("position-overlap", "overlap", "Overlap by position", "overlap",
         "Share of the leading entries in common; the band holds the middle half of the tokens."),
        ("position-kl", "reverse_kl", "Reverse KL by position", "nats",
         "On the student's top-k, the rest as one token: a lower bound of KL(student || teacher)."),
        ("position-logprob", "teacher_logprobs", "The teacher's log-prob by position", "nats",
         "Of the tokens that were said."),
        ("position-reliability", "reliability", "Reliability by position", "R",
         "R falls by a fixed amount at every bad event; at 0 nothing more is to be learnt."),
    ):  # fmt: skip
        if (profile := by_position(table, column)) is not None:
            found.append(_profile_chart(name, title, unit, caption, profile))
    return [*found, _histogram(table)]


def _profile_chart(name: str, title: str, unit: str, caption: str, profile: ByPosition) -> Chart:
    def draw(axis: Axes) -> None:
        axis.set(xlabel="response token", ylabel=unit)
        axis.fill_between(
            profile.middles, profile.low, profile.high, color=SERIES[0], alpha=0.2, linewidth=0
        )
        axis.plot(profile.middles, profile.mean, color=SERIES[0])
        axis.margins(y=0.08)

    return Chart(name=name, title=title, caption=caption, draw=draw)


def _histogram(table: pa.Table) -> Chart:
    lengths = np.array(table.column("num_tokens").to_pylist(), np.float64)
    finish = np.array([ended(finish) for finish in table.column("finish").to_pylist()])

    def draw(axis: Axes) -> None:
        edges = np.histogram_bin_edges(lengths, bins=min(30, max(5, len(lengths) // 2)))
        shown = [name for name in FINISHES if (finish == name).any()]
        axis.hist(
            [lengths[finish == name] for name in shown], bins=edges.tolist(), stacked=True,
            color=[FINISHES[name][1] for name in shown], label=[FINISHES[n][0] for n in shown],
        )  # fmt: skip
        exhausted = [at for at in table.column("exhausted_at").to_pylist() if at is not None]
        if exhausted:
            axis.axvline(
                float(np.median(exhausted)), color=STOPPED, linestyle="--", linewidth=1,
                label="median of where R reached 0",
            )  # fmt: skip
        axis.set(xlabel="tokens kept", ylabel="rollouts")
        legend(axis)

    caption = "Tokens kept of each rollout, by how it ended."
    return Chart(name="lengths-of-recorded", title="Lengths", caption=caption, draw=draw)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShare:
    """One token id and its part of what student and teacher disagree about."""

    token_id: int
    text: str
    count: int
    share: float
    """Of the sum over all tokens, in [0, 1]."""
    mean: float
    """Nats a token."""


def token_shares(
    table: pa.Table, pieces: TokenPieces | None, count: int = NUM_TOKENS_NAMED
) -> tuple[str, list[TokenShare]]:
    """What is summed, and the tokens that have the largest parts of it.

    Of the KL where it is there, else of how unlikely the teacher finds what was said.
    """
    has_kl = table.column("reverse_kl").null_count < len(table)
    measure = "reverse KL" if has_kl else "-log p_teacher"
    column = "reverse_kl" if has_kl else "teacher_logprobs"
    ids, values = [], []
    for row_ids, row_values, mask in zip(
        _arrays(table.column("response_ids").combine_chunks()),
        _arrays(table.column(column).combine_chunks()),
        _arrays(table.column("mask").combine_chunks()),
        strict=True,
    ):
        if row_ids is not None and row_values is not None and mask is not None:
            counted = mask.astype(np.bool_)
            ids.append(row_ids[counted].astype(np.int64))
            values.append(row_values[counted] if has_kl else -row_values[counted])
    if not ids or not (all_ids := np.concatenate(ids)).size:
        return measure, []
    amounts = np.concatenate(values)
    distinct, inverse = np.unique(all_ids, return_inverse=True)
    sums = np.bincount(inverse, weights=amounts)
    counts = np.bincount(inverse)
    whole = float(amounts.sum()) or 1.0
    largest = np.argsort(-sums)[:count]
    return measure, [
        TokenShare(
            token_id=int(distinct[i]),
            text=_text(int(distinct[i]), pieces),
            count=int(counts[i]),
            share=float(sums[i]) / whole,
            mean=float(sums[i] / counts[i]),
        )
        for i in largest.tolist()
    ]


def _text(token_id: int, pieces: TokenPieces | None) -> str:
    if pieces is None:
        return ""
    return "".join(text for _, text in pieces([token_id]))
