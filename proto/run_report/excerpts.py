"""The best and the worst of the recorded rollouts, as text with each piece shaded by how far
student and teacher are apart there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_report.figures import TokenPieces

NUM_SHOWN = 3
"""Of the best, and of the worst."""
MAX_TOKENS = 600
"""Of a response that is shown; the rest is counted."""
MAX_PROMPT_CHARACTERS, MAX_ANSWER_CHARACTERS = 1200, 80
"""The end of a longer one is shown."""
SHADES = 5
"""0 is none."""
KL_EDGES = (0.1, 0.4, 1.0, 2.5)
"""Nats at which a shade begins."""
LOGPROB_EDGES = (1.0, 2.5, 5.0, 9.0)
OVERLAP_EDGES = (0.15, 0.35, 0.55, 0.8)
"""Of the share that is not in common."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, of one shade."""

    text: str
    shade: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """One rollout for a person to read."""

    title: str
    facts: Sequence[tuple[str, str]]
    prompt: str
    pieces: Sequence[Piece]
    tokens_left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpts:
    """By what they are ranked and shaded, the best, and the worst."""

    ranked_by: str
    shaded_by: str
    best: Sequence[Excerpt]
    worst: Sequence[Excerpt]


RANKS = {
    "mean_overlap": ("overlap", 1),
    "mean_reverse_kl": ("reverse KL", -1),
    "mean_teacher_logprob": ("the teacher's log-prob", 1),
}
"""By the first of these that the rollouts have; the sign makes more better."""


def excerpts(table: pa.Table, pieces: TokenPieces | None, count: int = NUM_SHOWN) -> Excerpts:
    """None is shown twice: of few rollouts the worst are fewer."""
    name = next(
        (n for n in RANKS if table.column(n).null_count < len(table)), "mean_teacher_logprob"
    )
    label, sign = RANKS[name]
    values = table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    order = [
        i for i in np.argsort(-sign * values, kind="stable").tolist() if values[i] == values[i]
    ]
    num_best = min(count, (len(order) + 1) // 2)
    shading, _, _ = _shading(table)
    return Excerpts(
        ranked_by=label,
        shaded_by=shading,
        best=[_excerpt(table, i, pieces) for i in order[:num_best]],
        worst=[_excerpt(table, i, pieces) for i in order[num_best:][-count:][::-1]],
    )


def _shading(table: pa.Table) -> tuple[str, str, tuple[float, ...]]:
    """In words, the column, and where its shades begin."""
    if table.column("reverse_kl").null_count < len(table):
        return "reverse KL", "reverse_kl", KL_EDGES
    if table.column("overlap").null_count < len(table):
        return "what the top-k lists do not share", "overlap", OVERLAP_EDGES
    return "how unlikely the teacher finds a token", "teacher_logprobs", LOGPROB_EDGES


def _excerpt(table: pa.Table, number: int, pieces: TokenPieces | None) -> Excerpt:
    row = {name: table.column(name)[number] for name in table.column_names}
    said: dict[str, Any] = {
        name: row[name].as_py()
        for name in ("step", "index", "prompt_id", "prompt", "response", "answer", "correct",
                     "finish", "num_tokens", "num_generated", "exhausted_at", *RANKS)
    }  # fmt: skip
    num_tokens = said["num_tokens"]
    prompt = said["prompt"]
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        prompt = f"… {prompt[-MAX_PROMPT_CHARACTERS:]}"
    return Excerpt(
        title=f"step {said['step']}, rollout {said['index']}: {said['prompt_id']}",
        facts=_facts(said),
        prompt=prompt,
        pieces=_pieces(table, row, pieces) if pieces else [Piece(said["response"], 0)],
        tokens_left_out=max(0, num_tokens - MAX_TOKENS) if pieces else 0,
    )


def _facts(said: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (label, f"{said[name]:.3f}") for name, (label, _) in RANKS.items() if said[name] is not None
    ]
    facts += [("tokens", str(said["num_tokens"])), ("ended", said["finish"])]
    if said["finish"] == "truncated":
        facts.append(("generated", str(said["num_generated"])))
    if said["exhausted_at"] is not None:
        facts.append(("R reached 0 after", f"{said['exhausted_at']} tokens"))
    if said["correct"] is not None:
        facts.append(("answer", "right" if said["correct"] else "wrong"))
    if said["answer"] is not None and not said["correct"]:
        answer = said["answer"]
        is_long = len(answer) > MAX_ANSWER_CHARACTERS
        facts.append(("expected", f"… {answer[-MAX_ANSWER_CHARACTERS:]}" if is_long else answer))
    return facts


def _pieces(table: pa.Table, row: dict[str, Any], pieces: TokenPieces) -> list[Piece]:
    """Neighbours of one shade are one piece."""
    _, column, edges = _shading(table)
    ids = row["response_ids"].as_py()[:MAX_TOKENS]
    values = row[column]
    shades = np.zeros(len(ids), np.int64)
    if values.is_valid:
        shades = shade(column, values.values.to_numpy(zero_copy_only=False)[:MAX_TOKENS], edges)
    joined: list[Piece] = []
    start = 0
    for length, text in pieces(ids):
        # Of a character of several tokens the one that is furthest off counts.
        tone = int(shades[start : start + length].max(initial=0))
        start += length
        if joined and joined[-1].shade == tone:
            joined[-1] = Piece(joined[-1].text + text, tone)
        else:
            joined.append(Piece(text, tone))
    return joined


def shade(column: str, values: NDArray[Any], edges: Sequence[float]) -> NDArray[np.int64]:
    """[T] of 0 to SHADES - 1: the further apart, the darker."""
    values = values.astype(np.float64)
    apart = {"overlap": 1.0 - values, "teacher_logprobs": -values}.get(column, values)
    return np.searchsorted(edges, apart, side="right").astype(np.int64)
