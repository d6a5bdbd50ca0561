"""What the teacher's tests share: spans of random tokens, and exact comparison of answers."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from teacher_wire.records import ScoreRows, Scores, TokenSpan, concat_rows

VOCAB = 512


def make_span(
    num_tokens: int, *, offset: int = 0, width: int | None = 16, seed: int = 0
) -> TokenSpan:
    """Random tokens with `width` distinct candidates each."""
    rng = np.random.default_rng(seed)
    candidates = None
    if width is not None:
        rows = [rng.permutation(VOCAB)[:width] for _ in range(num_tokens)]
        candidates = np.array(rows, np.int32).reshape(num_tokens, width)
    return TokenSpan(
        offset=offset,
        token_ids=rng.integers(0, VOCAB, num_tokens, dtype=np.int32),
        candidate_ids=candidates,
        event_mask=rng.random(num_tokens) < 0.8,
    )


def cut(span: TokenSpan, start: int, stop: int) -> TokenSpan:
    """Tokens start..stop of a span that begins at 0."""
    return TokenSpan(
        offset=start,
        token_ids=span.token_ids[start:stop],
        candidate_ids=None if span.candidate_ids is None else span.candidate_ids[start:stop],
        event_mask=None if span.event_mask is None else span.event_mask[start:stop],
    )


def assert_rows_equal(left: ScoreRows, right: ScoreRows) -> None:
    """Equal to the bit, field by field."""
    for entry in fields(ScoreRows):
        a, b = getattr(left, entry.name), getattr(right, entry.name)
        np.testing.assert_array_equal(a, b, err_msg=entry.name)


def assert_same_response(parts: list[Scores], whole: Scores) -> None:
    """Consecutive answers say together what the whole answer says."""
    assert_rows_equal(concat_rows([part.rows for part in parts]), whole.rows)
    last = parts[-1]
    assert (last.drift, last.verdict, last.keep_tokens) == (
        whole.drift,
        whole.verdict,
        whole.keep_tokens,
    )
