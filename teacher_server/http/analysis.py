"""A scored response as a report for people: one entry a token, with what the teacher thought of it.

Knows records and token texts; knows no transport, no engine and no thresholds of its own.

Alignment: entry t is response token t; its log-prob, rank and top-K are those of the teacher given
the prompt and the response tokens before t. Reliability R_t already counts a bad event at t.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, make_dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_server.http.rows import number_of, refuse_non_finite
from teacher_wire.drift import reliability
from teacher_wire.drift_metrics import MAX_DRIFT_K
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import MODEL_COLUMNS, DriftPolicy, ScoreRows, Scores


class Tokenizer(Protocol):
    """The part of a transformers tokenizer used here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The vocabulary entry of an id."""


class TokenTexts:
    """The text that each token id adds to a text, remembered.

    Some decoders strip the space that starts a text, so an id is decoded behind an anchor and the
    anchor is cut off. An id that is only part of a character shows its raw vocabulary entry.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._anchor: list[int] = []
        self._anchor_text = ""
        if tokenizer is not None:
            self._anchor = tokenizer.encode("0", add_special_tokens=False)[-1:]
            self._anchor_text = _decode(tokenizer, self._anchor)

    def __getitem__(self, token_id: int) -> str | None:
        """The text, or None without a tokenizer or for an id outside its vocabulary."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._decode(token_id)
            if text is not None:
                self._texts[token_id] = text
        return text

    def _decode(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        entry = self._tokenizer.convert_ids_to_tokens(token_id)
        if entry is None:
            return None
        text = _decode(self._tokenizer, [*self._anchor, token_id]).removeprefix(self._anchor_text)
        return entry if not text or "\ufffd" in text else text


def _decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(
        token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """A token id and the text it stands for, None when no tokenizer knows it."""

    token_id: int
    token: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One entry of the teacher's top-K at a position."""

    token_id: int
    token: str | None
    logprob: float


_Extras: Any = make_dataclass(
    "_Extras",
    [(column.singular, number_of(column) | None) for column in MODEL_COLUMNS.extras],
    frozen=True,
    slots=True,
    kw_only=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReport(_Extras):  # type: ignore[misc]
    """One response token as the teacher sees it; None where nothing was asked for.

    Besides what stands here: one value of each column that an option asks for, under its singular
    (`entropy`, in nats, and `rank`, 1 = the teacher's most likely token).
    """

    position: int
    """Index among the response tokens, from 0."""
    token_id: int
    token: str | None
    logprob: float
    """nats"""
    topk: tuple[Alternative, ...]
    """Most likely first."""
    overlap: float | None
    """Share of the leading candidates that are among as many of the teacher's, in [0, 1]."""
    bad_event: bool | None
    reliability: float | None
    """R_t in [0, 1]; never rises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole response as the teacher sees it."""

    prompt: tuple[TokenText, ...]
    tokens: tuple[TokenReport, ...]
    mean_logprob: float
    """nats a response token"""
    num_bad_events: int | None
    exhausted_at: int | None
    """Response tokens up to and including the one where R reached 0; None while R > 0."""
    verdict: str
    keep_tokens: int | None
    """With verdict "truncate": response tokens to keep."""


def build_report(
    prompt_ids: NDArray[np.int32],
    response_ids: NDArray[np.int32],
    scores: Scores,
    policy: DriftPolicy | None,
    texts: TokenTexts,
) -> Report:
    """The report of one whole response, scored from its first token under `policy`.

    Raises InvalidRequestError when the rows are not those of the response, NonFiniteError when a
    number in them is not finite.
    """
    rows = scores.rows
    if not len(response_ids):
        raise InvalidRequestError("the response has 0 tokens, must have at least 1")
    if rows.offset != 0 or len(rows) != len(response_ids):
        raise InvalidRequestError(
            f"rows {rows.offset}..{rows.offset + len(rows)} do not cover a response of "
            f"{len(response_ids)} tokens"
        )
    refuse_non_finite(rows)
    return Report(
        prompt=tuple(TokenText(token_id=i, token=texts[i]) for i in prompt_ids.tolist()),
        tokens=_token_reports(response_ids, rows, policy, texts),
        mean_logprob=float(rows.token_logprobs.mean(dtype=np.float64)),
        num_bad_events=None if scores.drift is None else scores.drift.num_bad_events,
        exhausted_at=None if scores.drift is None else scores.drift.exhausted_at,
        verdict=scores.verdict.value,
        keep_tokens=scores.keep_tokens,
    )


def _token_reports(
    response_ids: NDArray[np.int32], rows: ScoreRows, policy: DriftPolicy | None, texts: TokenTexts
) -> tuple[TokenReport, ...]:
    overlaps: NDArray[np.float64] | None = None
    bad_events = reliabilities = None
    if rows.overlap_counts is not None:
        overlaps = rows.overlap_counts / _num_compared(rows, policy)
    if policy is not None and rows.bad_events is not None:
        bad_events = rows.bad_events
        reliabilities = reliability(policy.w_drop, bad_events)
    n = len(rows)
    columns: dict[str, Iterable[Any]] = {
        "position": range(n),
        "token_id": response_ids.tolist(),
        "token": map(texts.__getitem__, response_ids.tolist()),
        "logprob": rows.token_logprobs.tolist(),
        "topk": _alternatives(rows, texts),
        "overlap": _column(overlaps, n),
        "bad_event": _column(bad_events, n),
        "reliability": _column(reliabilities, n),
    }
    for column in MODEL_COLUMNS.extras:
        columns[column.singular] = _column(getattr(rows, column.name), n)
    return tuple(
        TokenReport(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    )


def _alternatives(rows: ScoreRows, texts: TokenTexts) -> Iterator[tuple[Alternative, ...]]:
    for ids, logprobs in zip(rows.topk_ids.tolist(), rows.topk_logprobs.tolist(), strict=True):
        yield tuple(
            Alternative(token_id=i, token=texts[i], logprob=value)
            for i, value in zip(ids, logprobs, strict=True)
        )


def _num_compared(rows: ScoreRows, policy: DriftPolicy | None) -> int:
    """How many leading entries an overlap count compares; see ScoreRows.overlap_counts."""
    limit = MAX_DRIFT_K if policy is None else policy.metric.k
    candidates = rows.candidate_logprobs
    num_candidates = 0 if candidates is None else candidates.shape[1]
    widths: list[int] = [rows.topk_ids.shape[1], num_candidates, limit]
    return min(widths)


def _column(array: NDArray[Any] | None, n: int) -> list[Any]:
    """The array as a list, or n times None."""
    return [None] * n if array is None else array.tolist()


def report_to_json(report: Report) -> dict[str, Any]:
    """The report as plain lists and dicts, for json.dumps.

    dataclasses.asdict would copy every leaf and take most of the time of a long report.
    """
    tokens = [
        {**_shallow(token), "topk": [_shallow(entry) for entry in token.topk]}
        for token in report.tokens
    ]
    prompt = [_shallow(entry) for entry in report.prompt]
    return {**_shallow(report), "prompt": prompt, "tokens": tokens}


def _shallow(record: Report | TokenReport | Alternative | TokenText) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
