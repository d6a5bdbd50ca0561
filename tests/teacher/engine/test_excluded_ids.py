"""Ids that take no part are as if the model had no logits for them, in every engine; and what else
there is to say of the scorer of the vLLM engine without one.

Run: python -m pytest tests/teacher/engine/test_excluded_ids.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher_server.engine.base import EXTRAS, ScoreQuery, ScoringEngine, check_query
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.engine.row_format import RowCollector, RowRequest
from teacher_server.engine.token_scorer import TokenScorer, _Span
from teacher_wire.errors import InvalidRequestError
from teacher_wire.id_ranges import IdRanges, inside, num_ids
from teacher_wire.records import MODEL_COLUMNS
from tests.teacher.engine.engine_models import VOCAB_SIZE, write_tiny_model

CUT = 320
CLOSE = 1e-5
"""Nats. The same sums of fewer numbers."""
HOLES: IdRanges = ((0, 2), (77, 78), (300, VOCAB_SIZE))
NUM_LEFT = VOCAB_SIZE - num_ids(HOLES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, and `cut`, the same model without the rows of the ids from CUT on."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "whole", seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype="float32")
    model.resize_token_embeddings(CUT)
    model.save_pretrained(folder / "cut")
    return folder


@pytest.fixture(params=["fake", "hf"])
async def engines(
    request: pytest.FixtureRequest, models: Path
) -> AsyncIterator[tuple[ScoringEngine, ScoringEngine]]:
    """One with all ids, and one that has none from CUT on."""
    if request.param == "fake":
        yield FakeEngine(vocab_size=VOCAB_SIZE, max_k=VOCAB_SIZE), FakeEngine(vocab_size=CUT)
        return
    whole, cut = (
        HfEngine(model=str(models / name), device="cpu", max_k=VOCAB_SIZE)
        for name in ("whole", "cut")
    )
    for engine in (whole, cut):
        await engine.start()
    yield whole, cut
    for engine in (whole, cut):
        await engine.close()


def query(excluded_ids: IdRanges = (), *, k: int = 8, temperature: float = 0.7) -> ScoreQuery:
    """Of tokens and candidates below CUT, and in none of HOLES."""
    rng = np.random.default_rng(0)
    ids = np.setdiff1d(np.arange(2, 300), [77]).astype(np.int32)
    return ScoreQuery(
        token_ids=rng.choice(ids, 40),
        first_row=5,
        candidate_ids=rng.choice(ids, (35, 3)),
        k=k,
        temperature=temperature,
        extras=EXTRAS,
        excluded_ids=excluded_ids,
    )


async def test_an_excluded_tail_is_a_model_without_those_rows(
    engines: tuple[ScoringEngine, ScoringEngine],
) -> None:
    whole, cut = engines
    rows = await whole.score(query(((CUT, VOCAB_SIZE),)))
    expected = await cut.score(query())
    for name in MODEL_COLUMNS.names:
        got, want = getattr(rows, name), getattr(expected, name)
        assert np.abs(got - want).max() <= CLOSE, name
    plain = await whole.score(query())
    assert np.abs(plain.token_logprobs - rows.token_logprobs).max() > 0.01
    assert (plain.topk_ids >= CUT).any()


async def test_scattered_ids_are_in_no_column(
    engines: tuple[ScoringEngine, ScoringEngine],
) -> None:
    whole, _ = engines
    rows = await whole.score(query(HOLES, k=NUM_LEFT))
    plain = await whole.score(query(k=VOCAB_SIZE))
    held = inside(HOLES, np.arange(VOCAB_SIZE))
    assert sorted(rows.topk_ids[0].tolist()) == np.flatnonzero(~held).tolist()
    # The others keep their differences: what the excluded ones had is shared out among them.
    shift_n = rows.token_logprobs - plain.token_logprobs
    assert (shift_n > 0).all()
    assert rows.candidate_logprobs is not None
    assert plain.candidate_logprobs is not None
    moved_nC = rows.candidate_logprobs - plain.candidate_logprobs
    assert np.abs(moved_nC - shift_n[:, None]).max() < CLOSE
    assert rows.token_ranks is not None
    assert plain.token_ranks is not None
    assert (rows.token_ranks <= plain.token_ranks).all()
    assert (rows.token_ranks < plain.token_ranks).any()


def test_a_top_k_of_more_ids_than_are_left_is_refused() -> None:
    info = FakeEngine(vocab_size=VOCAB_SIZE, max_k=VOCAB_SIZE).info
    check_query(query(HOLES, k=NUM_LEFT), info)
    with pytest.raises(InvalidRequestError, match=rf"k is {NUM_LEFT + 1}, .* \[1, {NUM_LEFT}\]"):
        check_query(query(HOLES, k=NUM_LEFT + 1), info)


@pytest.mark.parametrize("rows_of_all", [True, False], ids=["one piece", "chunks of 16"])
def test_requests_of_one_step_each_leave_out_their_own(rows_of_all: bool) -> None:
    """The scorer of the vLLM engine; its requests travel as plain values."""
    head_HV = torch.randn(16, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    hidden_TH = torch.randn(4 * 35, 16, generator=torch.Generator().manual_seed(2))
    excluded: list[IdRanges] = [(), HOLES, ((CUT, VOCAB_SIZE),), ()]
    kwargs = [RowRequest.of_query(query(ranges), 32).to_kwargs() for ranges in excluded]
    requests = [
        RowRequest.of_kwargs(of | {"excluded_ids": [list(span) for span in of["excluded_ids"]]})
        for of in kwargs
    ]
    assert [request.excluded_ids for request in requests] == excluded
    spans = [_Span(r, np.arange(35 * i, 35 * (i + 1)), 5) for i, r in enumerate(requests)]
    size = VOCAB_SIZE if rows_of_all else 2**24
    scorer = TokenScorer(compute_logits=lambda hidden: hidden @ head_HV, vocab_size=size)
    packed_RW = scorer._score(hidden_TH, spans)
    assert packed_RW is not None
    for i, (request, ranges) in enumerate(zip(requests, excluded, strict=True)):
        rows = slice(35 * i, 35 * (i + 1))
        logits_nV = hidden_TH[rows] @ head_HV
        logits_nV[:, torch.from_numpy(inside(ranges, np.arange(VOCAB_SIZE)))] = -torch.inf
        logprobs_nV = torch.log_softmax(logits_nV / request.temperature, -1)
        collector = RowCollector(request)
        collector.add(packed_RW[rows].numpy(), 35)
        got = collector.rows()
        top = logprobs_nV.topk(request.k).values.numpy()
        assert np.abs(got.topk_logprobs - top).max() <= CLOSE
        targets = torch.from_numpy(request.target_ids.astype(np.int64))[:, None]
        own = logprobs_nV.gather(1, targets)[:, 0].numpy()
        assert np.abs(got.token_logprobs - own).max() <= CLOSE
        entropies = torch.special.entr(logprobs_nV.exp()).sum(-1).numpy()
        assert got.entropies is not None
        assert np.abs(got.entropies - entropies).max() <= CLOSE


def test_a_rank_without_logits_takes_part_in_the_gathering_of_every_chunk() -> None:
    """Of several that share the head, where one alone has what they gather."""
    asked = list[int]()

    def gather(hidden_RH: torch.Tensor) -> None:
        asked.append(len(hidden_RH))

    span = _Span(RowRequest.of_query(query(), 32), np.arange(35), 5)
    scorer = TokenScorer(compute_logits=gather, vocab_size=2**24)
    assert scorer._score(torch.zeros(35, 16), [span]) is None
    assert asked == [16, 16, 3]
