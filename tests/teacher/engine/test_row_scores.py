"""Packed rows equal log_softmax, ties and broken rows included: pytest -k row_scores"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.engine import row_scores
from teacher_server.engine.base import EXTRAS, ScoreQuery
from teacher_server.engine.extras import DEFINITIONS, Distribution
from teacher_server.engine.row_format import (
    EXTRA_AT,
    HEADER,
    POSITION,
    TOKEN_LOGPROB,
    RowCollector,
    RowRequest,
)
from teacher_server.scoring.judging import check_rows
from teacher_wire.records import MODEL_COLUMNS

PROPERTY = settings(max_examples=60, deadline=None)
NATS = 5e-6
"""Rounding of float32 sums over a few thousand entries."""


def slow_score_rows(
    logits_RV: torch.Tensor,
    positions_R: torch.Tensor,
    targets_R: torch.Tensor,
    candidates_RC: torch.Tensor,
    inverse_temperatures_R: torch.Tensor,
    *,
    k: int,
) -> dict[str, np.ndarray]:
    """The definition, in double precision."""
    scaled_RV = logits_RV.double() * inverse_temperatures_R.double()[:, None]
    logprobs_RV = torch.log_softmax(scaled_RV, dim=-1)
    at_targets_R1 = logprobs_RV.gather(1, targets_R[:, None])
    whole = Distribution(
        logits_RV, logprobs_RV, logprobs_RV.exp(), logits_RV.gather(1, targets_R[:, None])
    )
    return {
        "positions": positions_R.numpy(),
        "logprobs": logprobs_RV.numpy(),
        "token": at_targets_R1[:, 0].numpy(),
        "top": logprobs_RV.topk(k).values.numpy(),
        "candidates": logprobs_RV.gather(1, candidates_RC).numpy(),
        **{name: define(whole).numpy() for name, define in DEFINITIONS.items()},
    }


def arguments(
    seed: int, num_rows: int, vocab_size: int, dtype: torch.dtype, *, grain: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """Logits, positions, targets, candidates and inverse temperatures; `grain` makes ties."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = 4 * torch.randn(num_rows, vocab_size, generator=generator)
    if grain:
        logits_RV = (logits_RV / grain).round() * grain
    return (
        logits_RV.to(dtype),
        torch.arange(3, 3 + num_rows, dtype=torch.int32),
        torch.randint(vocab_size, (num_rows,), generator=generator),
        torch.randint(vocab_size, (num_rows, 5), generator=generator),
        0.5 + torch.rand(num_rows, generator=generator),
    )


def assert_packed(packed: np.ndarray, expected: dict[str, np.ndarray], k: int) -> None:
    floats = packed.view(np.float32)
    ids = packed[:, HEADER : HEADER + k]
    assert packed[:, POSITION].tolist() == expected["positions"].tolist()
    np.testing.assert_allclose(floats[:, TOKEN_LOGPROB], expected["token"], atol=NATS)
    for column in MODEL_COLUMNS.extras:
        values = (floats if column.is_float else packed)[:, EXTRA_AT[column.name]]
        limits = {"atol": 1e-4, "rtol": 1e-5} if column.is_float else {"rtol": 0}
        np.testing.assert_allclose(values, expected[column.name], err_msg=column.name, **limits)
    top = floats[:, HEADER + k : HEADER + 2 * k]
    np.testing.assert_allclose(top, expected["top"], atol=NATS)
    np.testing.assert_allclose(floats[:, HEADER + 2 * k :], expected["candidates"], atol=NATS)
    # Ids may differ among equal logits, but each has the log-prob that stands beside it.
    at_ids = np.take_along_axis(expected["logprobs"], ids, axis=1)
    np.testing.assert_allclose(at_ids, expected["top"], atol=1e-12)
    assert all(len(set(row)) == k for row in ids.tolist())


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(1, 20),
    vocab_size=st.integers(50, 3000),
    k=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    grain=st.sampled_from([0.0, 0.25, 4.0]),
)
def test_rows_equal_their_definition(
    seed: int, num_rows: int, vocab_size: int, k: int, dtype: torch.dtype, grain: float
) -> None:
    given_rows = arguments(seed, num_rows, vocab_size, dtype, grain=grain)
    expected = slow_score_rows(*given_rows, k=k)
    for at_once in (False, True):
        packed = row_scores.score_rows(*given_rows, k=k, extras=EXTRAS, at_once=at_once)
        assert_packed(packed.numpy(), expected, k)


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.integers(1, 20_000),
    k=st.integers(1, 130),
    grain=st.sampled_from([0.0, 1.0, 8.0]),
)
def test_two_stages_find_the_top_k(seed: int, vocab_size: int, k: int, grain: float) -> None:
    k = min(k, vocab_size)
    logits_RV = arguments(seed, 3, vocab_size, torch.float32, grain=grain)[0]
    values_RK, ids_RK = row_scores.topk_in_blocks(logits_RV, k)
    assert torch.equal(values_RK, logits_RV.topk(k).values)
    assert torch.equal(logits_RV.gather(1, ids_RK), values_RK)
    assert all(len(set(row)) == k for row in ids_RK.tolist())


def test_the_top_k_of_the_last_few_logits_is_found() -> None:
    vocab_size = 64 * 100 + 63
    logits_RV = torch.zeros(1, vocab_size)
    logits_RV[0, -40:] = torch.arange(1.0, 41.0)
    _, ids_RK = row_scores.topk_in_blocks(logits_RV, 40)
    assert ids_RK[0].tolist() == list(range(vocab_size - 1, vocab_size - 41, -1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 77, 2999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_row_has_no_good_log_prob(value: float, place: int, dtype: torch.dtype) -> None:
    given_rows = arguments(0, 3, 3000, dtype)
    given_rows[0][1, place] = value
    packed = row_scores.score_rows(*given_rows, k=8, extras={"entropies"}).numpy()
    floats = packed.view(np.float32)
    logprobs = np.concatenate([floats[:, [TOKEN_LOGPROB]], floats[:, HEADER + 8 :]], axis=1)
    assert np.isnan(logprobs[1]).all()
    assert np.isfinite(logprobs[[0, 2]]).all()


def test_an_impossible_token_leaves_its_row_good() -> None:
    given_rows = arguments(0, 2, 3000, torch.float32)
    given_rows[0][:, 100:200] = float("-inf")
    packed = row_scores.score_rows(*given_rows, k=8, extras=EXTRAS).numpy()
    expected = slow_score_rows(*given_rows, k=8)
    floats = packed.view(np.float32)
    np.testing.assert_allclose(floats[:, HEADER + 8 : HEADER + 16], expected["top"], atol=NATS)
    np.testing.assert_allclose(floats[:, EXTRA_AT["entropies"]], expected["entropies"], atol=1e-4)


def test_rows_without_candidates_and_no_rows_at_all() -> None:
    given_rows = arguments(0, 9, 500, torch.float32)
    logits_RV, positions_R, targets_R, candidates_RC, inverse_R = given_rows
    for rows in (slice(9), slice(0)):
        packed = row_scores.score_rows(
            logits_RV[rows],
            positions_R[rows],
            targets_R[rows],
            candidates_RC[rows, :0],
            inverse_R[rows],
            k=2,
            extras=frozenset(),
        )
        assert packed.shape == (len(positions_R[rows]), HEADER + 4)


def test_logits_are_left_as_they_were() -> None:
    given_rows = arguments(0, 20, 3000, torch.float32)
    before = given_rows[0].clone()
    row_scores.score_rows(*given_rows, k=8, extras=EXTRAS)
    assert torch.equal(given_rows[0], before)


@pytest.mark.parametrize("extras", [frozenset(), *(frozenset({n}) for n in sorted(EXTRAS)), EXTRAS])
@pytest.mark.parametrize("num_candidates", [0, 5])
def test_a_packed_answer_becomes_the_columns_asked_for(
    extras: frozenset[str], num_candidates: int
) -> None:
    """The way of a query to an engine's worker and back, without the engine."""
    logits_RV, _, targets_R, candidates_RC, _ = arguments(0, 6, 300, torch.float32)
    candidates_RC = candidates_RC[:, :num_candidates]
    query = ScoreQuery(
        token_ids=np.concatenate([[1, 2], targets_R.numpy()]).astype(np.int32),
        first_row=2,
        candidate_ids=candidates_RC.numpy().astype(np.int32) if num_candidates else None,
        k=4,
        temperature=0.5,
        extras=extras,
    )
    request = RowRequest.of_kwargs(RowRequest.of_query(query, 16).to_kwargs())
    positions_R = torch.arange(2, 8, dtype=torch.int32)
    inverse_R = torch.full((6,), 2.0)
    packed = row_scores.score_rows(
        logits_RV, positions_R, targets_R, candidates_RC, inverse_R, k=4, extras=request.extras
    )
    collector = RowCollector(request)
    collector.add(packed[3:].numpy(), 4)
    assert collector.missing_end() == 5
    collector.add(packed[:4].numpy(), 3)
    rows = collector.rows()
    check_rows(rows, query)
    assert rows.computed_tokens == 7
    expected = slow_score_rows(logits_RV, positions_R, targets_R, candidates_RC, inverse_R, k=4)
    for column in MODEL_COLUMNS:
        if getattr(rows, column.name) is not None:
            assert getattr(rows, column.name).dtype == column.in_memory
    np.testing.assert_allclose(rows.topk_logprobs, expected["top"], atol=NATS)
    np.testing.assert_allclose(rows.token_logprobs, expected["token"], atol=NATS)
    if rows.candidate_logprobs is not None:
        np.testing.assert_allclose(rows.candidate_logprobs, expected["candidates"], atol=NATS)
    for name in extras:
        np.testing.assert_allclose(getattr(rows, name), expected[name], atol=1e-4, rtol=1e-5)
