"""Frozen numpy records that cross the wire. Both sides speak these; only codec.py sees a message.

Legend: p = prompt tokens, n or m = rows (response tokens), K = teacher top-k, C = candidates a row.

Alignment: row t belongs to response token t and holds the teacher's distribution given the prompt
and the response tokens before t. Log-probs are in nats, over the full vocabulary less the excluded
ids, at the temperature of ScoreOptions. A missing array is None, never a number.

Worked example: prompt [5, 9], response [7, 7, 2]. A span with offset 1 and token_ids [7, 2] yields
two rows: row 0 is p(. | 5, 9, 7) with the log-prob of 7, row 1 is p(. | 5, 9, 7, 7) with the
log-prob of 2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from teacher_wire.columns import CANDIDATE_IDS, LOGPROB, POLICY, Column, Width, columns_of
from teacher_wire.drift_metrics import DriftMetric, OverlapRatio, check_share
from teacher_wire.errors import InvalidRequestError
from teacher_wire.id_ranges import IdRanges, check_ranges

PROTOCOL_VERSION = 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3


class LogprobDtype(StrEnum):
    """Element type of log-probs on the wire. A string, whose hash takes no call."""

    F16 = "f16"
    F32 = "f32"


class Verdict(Enum):
    """What the drift policy says of a response so far."""

    CONTINUE = "continue"
    TRUNCATE = "truncate"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """What each row holds; fixed for a session."""

    k: int
    """Size of the teacher's top-k."""
    temperature: float = 1.0
    """The teacher's logits are divided by this before the softmax; by less, they overflow."""
    logprob_dtype: LogprobDtype = LogprobDtype.F32
    want_entropy: bool = False
    want_rank: bool = False
    excluded_ids: IdRanges = ()
    """Ids that take no part: in no softmax, top-k, entropy and rank. Empty: all take part."""
    extras: frozenset[str] = field(init=False, repr=False, compare=False)
    """Names of the columns that the flags ask for."""

    def __post_init__(self) -> None:
        extras = frozenset(c.name for c in MODEL_COLUMNS.extras if getattr(self, c.asked_by))
        object.__setattr__(self, "extras", extras)
        if self.k < 1:
            raise InvalidRequestError(f"k is {self.k}, must be at least 1")
        if not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise InvalidRequestError(
                f"temperature is {self.temperature}, "
                f"must be in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]"
            )
        check_ranges(self.excluded_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftPolicy:
    """The trainer's rule for drift (Prune-OPD); the server has no thresholds of its own."""

    metric: DriftMetric = field(default_factory=OverlapRatio)
    """What a bad event is."""
    w_drop: float = 0.01
    """Loss of reliability a bad event: R_t = clip(1 - w_drop * bad events up to t, 0, 1)."""
    stop_in_flight: bool = True
    """Send TRUNCATE at the first position where R reaches 0; False observes only."""

    def __post_init__(self) -> None:
        check_share("w_drop", self.w_drop)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftState:
    """Drift of one response so far; enough to go on from num_tokens."""

    num_tokens: int = 0
    num_bad_events: int = 0
    exhausted_at: int | None = None
    """Response tokens up to and including the one where R reached 0; None while R > 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpan:
    """A piece of a response with what the teacher needs to judge it."""

    offset: int
    """Response position of the first token."""
    token_ids: NDArray[np.int32]
    """[m]"""
    candidate_ids: NDArray[np.int32] | None = None
    """[m, C] the student's own top-k, most likely first."""
    event_mask: NDArray[np.bool_] | None = None
    """[m] False where a position may raise no drift event; None means all may."""

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise InvalidRequestError(f"span offset is {self.offset}, must not be negative")
        if self.token_ids.ndim != 1:
            raise InvalidRequestError(f"token_ids has shape {self.token_ids.shape}, must be [m]")
        num_tokens = len(self.token_ids)
        if self.candidate_ids is not None:
            shape = self.candidate_ids.shape
            if len(shape) != 2 or shape[0] != num_tokens:
                raise InvalidRequestError(
                    f"candidate_ids has shape {shape}, must be [{num_tokens}, C]: one row a token"
                )
        if self.event_mask is not None and self.event_mask.shape != (num_tokens,):
            raise InvalidRequestError(
                f"event_mask has shape {self.event_mask.shape}, must be [{num_tokens}]"
            )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRows:
    """What a model says of n consecutive tokens."""

    topk_ids: Annotated[NDArray[np.int32], Column("<i4", Width.TOP_K)]
    """[n, K] most likely first."""
    topk_logprobs: Annotated[NDArray[np.float32], Column(LOGPROB, Width.TOP_K)]
    """[n, K]"""
    token_logprobs: Annotated[NDArray[np.float32], Column(LOGPROB)]
    """[n] of the actual token."""
    candidate_logprobs: Annotated[
        NDArray[np.float32] | None, Column(LOGPROB, Width.CANDIDATES, CANDIDATE_IDS)
    ] = None
    """[n, C] at the candidate ids of the span."""
    entropies: Annotated[
        NDArray[np.float32] | None, Column("<f4", asked_by="want_entropy", singular="entropy")
    ] = None
    """[n] nats, of the full distribution."""
    token_ranks: Annotated[
        NDArray[np.int32] | None, Column("<i4", asked_by="want_rank", singular="rank")
    ] = None
    """[n] rank of the actual token, 1 = most likely."""

    def __len__(self) -> int:
        return len(self.token_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRows(ModelRows):
    """The teacher's scores of n consecutive response tokens, and how they were judged."""

    offset: int
    """Response position of row 0."""
    overlap_counts: Annotated[NDArray[np.uint8] | None, Column("|u1", asked_by=CANDIDATE_IDS)] = (
        None
    )
    """[n] common entries of the first d candidates and the teacher's top d, where d is the policy's
    k, or min(K, C, 255) without a policy. None without candidates."""
    bad_events: Annotated[NDArray[np.bool_] | None, Column("|b1", asked_by=POLICY)] = None
    """[n] True where the drift policy saw a bad event."""


MODEL_COLUMNS = columns_of(ModelRows)
ROW_COLUMNS = columns_of(ScoreRows)
ROW_FLAGS = tuple(column.asked_by for column in ROW_COLUMNS.extras)
"""The flags of ScoreOptions that ask for a column each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time of one scoring call went, on the server."""

    queue_us: int = 0
    engine_us: int = 0
    computed_tokens: int | None = None
    """Tokens the model was run on: the new ones, and those before them whose work was not kept.
    None from a teacher that does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The answer to one append: rows, drift after them, and what the policy says."""

    rows: ScoreRows
    drift: DriftState | None
    verdict: Verdict
    keep_tokens: int | None
    """With TRUNCATE: response tokens to keep, else None."""
    timing: Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """What a server serves, and its limits."""

    model_id: str
    revision: str
    weights_digest: str
    """SHA-256 over the weight files."""
    dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    special_token_ids: tuple[int, ...]
    max_k: int
    """Largest top-k, and largest number of candidate ids a row."""
    max_context: int
    """Largest prompt plus response, in tokens."""
    engine: str
    engine_version: str
    instance_id: str
    max_sessions: int
    max_append_tokens: int
    protocol_version: int = PROTOCOL_VERSION
    server_version: str = ""
    block_tokens: int = 1
    """An append that ends where prompt plus response is a multiple of this lets the next one begin
    without computing a token again."""
    end_token_ids: tuple[int, ...] = ()
    """With which the model ends a response by its own configuration; empty: it names none."""
    token_digests: tuple[str, ...] = ()
    """What the ids mean, by blocks: teacher_wire.vocabulary; empty: there is no tokenizer."""


def flags_for(columns: Collection[str]) -> dict[str, Any]:
    """What ScoreOptions must be made with to get these columns and no other extra one.

    Raises InvalidRequestError for a name that no option asks for.
    """
    names = {column.name for column in ROW_COLUMNS.extras}
    if unknown := sorted(set(columns) - names):
        raise InvalidRequestError(
            f"columns {', '.join(unknown)}: must be of those to ask for, {', '.join(sorted(names))}"
        )
    return {column.asked_by: column.name in columns for column in ROW_COLUMNS.extras}


def slice_rows(rows: ScoreRows, start: int, stop: int) -> ScoreRows:
    """Rows start..stop, as views."""
    columns = ROW_COLUMNS.cut(rows, slice(start, stop))
    return ScoreRows(offset=rows.offset + start, **columns)


def concat_rows(parts: list[ScoreRows]) -> ScoreRows:
    """The rows of consecutive parts; raises InvalidRequestError where they leave a gap."""
    if len(parts) == 1:
        return parts[0]
    for left, right in pairwise(parts):
        if right.offset != left.offset + len(left):
            raise InvalidRequestError(
                f"rows go on at {right.offset}, must go on at {left.offset + len(left)}"
            )
    return ScoreRows(offset=parts[0].offset, **ROW_COLUMNS.joined(parts))
