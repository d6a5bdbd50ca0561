"""Every engine equals the obvious one: pytest tests/teacher/engine/test_engines.py"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.engine.self_test import self_test
from teacher_server.engine.vllm_engine import VllmEngine
from teacher_server.process.loading import build_engine
from teacher_server.settings import TeacherConfig
from teacher_wire.errors import EngineError, InvalidRequestError, NonFiniteError
from tests.cores import own_core
from tests.teacher.engine.engine_models import VOCAB_SIZE, write_tiny_model
from tests.teacher.engine.engine_queries import (
    NAN_TOKEN_ID,
    TOLERANCE,
    C,
    K,
    a_query,
    assert_same_rows,
    grow,
    random_bounds,
    random_ids,
)

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM leaves the context under its asyncio context to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]

BLOCK = 32
MAX_CONTEXT = 1024
MAX_BATCHED_TOKENS = 256
KV_CACHE_TOKENS = 4096
KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 32 * 4
"""Layers, keys and values, KV heads, head_dim, float32."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("engine_model"), seed=1, nan_token_id=NAN_TOKEN_ID
    )


@pytest.fixture(scope="module")
async def reference(model_dir: Path) -> AsyncIterator[HfEngine]:
    engine = HfEngine(model=str(model_dir), max_context=MAX_CONTEXT, device="cpu", max_sessions=2)
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
async def vllm_engine(model_dir: Path) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(
        model=str(model_dir),
        max_context=MAX_CONTEXT,
        block_size=BLOCK,
        kv_cache_gib=KV_CACHE_TOKENS * KV_BYTES_PER_TOKEN / 2**30,
        max_num_seqs=32,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        enforce_eager=True,
        cpu_cores=own_core(),
    )
    await engine.start()
    yield engine
    await engine.close()


async def test_an_engine_on_a_cpu_asks_for_a_few_gib_and_for_ray_if_told(model_dir: Path) -> None:
    """vLLM's own choice is nine tenths of the machine, and an error where they are not free."""
    for gib, executor, told in ((None, "auto", (4 << 30, False)), (0.5, "ray", (1 << 29, True))):
        asked = VllmEngine(model=str(model_dir), kv_cache_gib=gib, executor=executor)._engine_args()
        assert (asked.kv_cache_memory_bytes, asked.distributed_executor_backend == "ray") == told


async def test_a_teacher_on_a_gpu_has_float32_logits_unless_told(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the 16th and 17th of 152k are equal in 45 % of rows. The arguments alone are
    looked at, since a GPU need not be here."""
    from vllm.platforms import current_platform

    folder = str(model_dir)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    for engine, expected in (
        (build_engine(TeacherConfig(model=folder)), "float32"),
        (build_engine(TeacherConfig(model=folder, head_dtype="model")), "model"),
    ):
        assert isinstance(engine, VllmEngine)
        assert engine._engine_args().hf_overrides["head_dtype"] == expected


@pytest.mark.parametrize("seed", range(3))
async def test_hf_in_pieces_equals_one_shot(reference: HfEngine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    token_ids = random_ids(100 + seed, 700)
    bounds = random_bounds(rng, 1 + seed * 40, 700, 9)
    pieces = await grow(reference, token_ids, bounds, session="pieces")
    whole = await reference.score(a_query(token_ids, bounds[0]))
    assert_same_rows(pieces, whole)
    assert pieces.computed_tokens == whole.computed_tokens == 699  # the last token is not read


async def test_hf_recomputes_evicted_forgotten_and_rewritten_sessions(reference: HfEngine) -> None:
    token_ids = random_ids(7, 200)
    expected = await reference.score(a_query(token_ids, 120))
    for disturbance in ("evict", "forget", "rewrite"):
        await reference.score(a_query(token_ids[:150], 1, session="s"))
        if disturbance == "evict":
            for other in ("a", "b"):
                await reference.score(a_query(random_ids(8, 50), 1, session=other))
        elif disturbance == "forget":
            reference.forget("s")
        else:
            await reference.score(a_query(random_ids(9, 180), 1, session="s"))
        again = await reference.score(a_query(token_ids, 120, session="s"))
        assert_same_rows(again, expected)
        assert again.computed_tokens == 199


async def test_hf_says_what_log_softmax_says(reference: HfEngine, model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    token_ids = random_ids(11, 40)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    with torch.inference_mode():
        logits_LV = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0]
    logprobs_LV = torch.log_softmax(logits_LV / 0.7, dim=-1).numpy()
    rows = await reference.score(a_query(token_ids, 1, temperature=0.7))
    expected = logprobs_LV[np.arange(39), token_ids[1:]]
    np.testing.assert_allclose(rows.token_logprobs, expected, atol=TOLERANCE)


async def test_hf_passes_the_self_test(reference: HfEngine) -> None:
    assert await self_test(reference) < 1e-3


async def test_self_test_refuses_shifted_rows(reference: HfEngine, model_dir: Path) -> None:
    class Shifted(HfEngine):
        """Answers each query of a grown session for one token earlier."""

        async def score(self, query: ScoreQuery) -> EngineRows:
            if query.first_row > 1:
                query = replace(query, token_ids=np.roll(query.token_ids, 1))
            return await reference.score(query)

    shifted = Shifted(model=str(model_dir), max_context=MAX_CONTEXT)
    with pytest.raises(EngineError, match="differ by"):
        await self_test(shifted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_row": 0}, "first_row is 0"),
        ({"k": 0}, "k is 0"),
        ({"k": 10_000}, "k is 10000"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"token_ids": np.full(20, VOCAB_SIZE, dtype=np.int32)}, "token_ids spans"),
        ({"candidate_ids": np.full((10, 2), -1, dtype=np.int32)}, "candidate_ids spans"),
        ({"candidate_ids": np.zeros((3, 2), dtype=np.int32)}, "candidate_ids has shape"),
    ],
)
async def test_impossible_queries_are_refused(
    reference: HfEngine, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await reference.score(replace(a_query(random_ids(12, 20), 10), **change))


async def test_a_query_beyond_the_context_is_refused(reference: HfEngine) -> None:
    with pytest.raises(InvalidRequestError, match="max_context is 1024"):
        await reference.score(a_query(random_ids(13, MAX_CONTEXT + 1), 1))


async def test_hf_raises_on_nan(reference: HfEngine) -> None:
    token_ids = random_ids(14, 60)
    token_ids[30] = NAN_TOKEN_ID
    with pytest.raises(NonFiniteError, match="not finite"):
        await reference.score(a_query(token_ids, 20))


@pytest.mark.parametrize("engine_class", [HfEngine, VllmEngine])
async def test_a_missing_model_is_an_engine_error(
    engine_class: type[HfEngine] | type[VllmEngine], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="no readable model"):
        engine_class(model=str(tmp_path))


@pytest.mark.vllm
class TestVllm:
    """One engine for all; its cache holds 4096 tokens, so older sessions may be evicted."""

    @pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
    async def test_one_shot_equals_hf(
        self, vllm_engine: VllmEngine, reference: HfEngine, temperature: float
    ) -> None:
        query = a_query(random_ids(20, 150), 1, temperature=temperature)
        assert_same_rows(await vllm_engine.score(query), await reference.score(query))

    async def test_rows_of_bfloat16_logits_are_normalised_in_float32(self) -> None:
        import torch

        from teacher_server.engine.row_format import EXTRA_AT, HEADER, TOKEN_LOGPROB
        from teacher_server.engine.token_scorer import score_rows

        generator = torch.Generator().manual_seed(0)
        logits_RV = (8 * torch.randn(5, 3000, generator=generator)).bfloat16()
        temperatures_R = torch.tensor([0.5, 0.7, 1.0, 1.5, 3.0])
        ids_RC = torch.randint(3000, (5, 3), generator=generator)
        packed = score_rows(
            logits_RV,
            torch.arange(5, dtype=torch.int32),
            ids_RC[:, 0],
            ids_RC,
            1 / temperatures_R,
            k=4,
            extras={"token_ranks"},
        ).numpy()
        expected = torch.log_softmax(logits_RV.double() / temperatures_R[:, None], dim=-1)
        candidates = expected.gather(1, ids_RC).numpy()
        logprobs = packed.view(np.float32)
        np.testing.assert_allclose(logprobs[:, HEADER + 8 :], candidates, atol=TOLERANCE)
        np.testing.assert_allclose(logprobs[:, TOKEN_LOGPROB], candidates[:, 0], atol=TOLERANCE)
        top = expected.topk(4).values.numpy()
        np.testing.assert_allclose(logprobs[:, HEADER + 4 : HEADER + 8], top, atol=TOLERANCE)
        ranks = (expected > expected.gather(1, ids_RC[:, :1])).sum(-1).numpy() + 1
        assert packed[:, EXTRA_AT["token_ranks"]].tolist() == ranks.tolist()

    async def test_row_chunks_do_not_change_rows(self) -> None:
        import torch

        from teacher_server.engine.row_format import EXTRA_AT, HEADER, POSITION, RowRequest
        from teacher_server.engine.token_scorer import TokenScorer, _Span

        head_HV = torch.randn(16, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
        hidden_TH = torch.randn(70, 16, generator=torch.Generator().manual_seed(2))
        spans = [
            _Span(RowRequest.of_query(a_query(random_ids(1, 60), 20), BLOCK), np.arange(40), 20),
            _Span(
                RowRequest.of_query(a_query(random_ids(2, 40), 5, k=3), BLOCK),
                np.arange(45, 70),
                15,
            ),
        ]
        scorers = [
            TokenScorer(compute_logits=lambda hidden: hidden @ head_HV, vocab_size=vocab_size)
            for vocab_size in (VOCAB_SIZE, 2**24)
        ]
        whole, in_chunks_of_16 = (scorer._score(hidden_TH, spans) for scorer in scorers)
        assert whole.shape == (65, 4 + 2 * K + C)
        rank = EXTRA_AT["token_ranks"]
        ids = [POSITION, *range(HEADER, HEADER + K)]
        floats = [column for column in range(whole.shape[1]) if column not in (rank, *ids)]
        assert torch.equal(whole[:, ids], in_chunks_of_16[:, ids])
        assert (whole[:, rank] - in_chunks_of_16[:, rank]).abs().max() <= 1
        # Logits are sums of 16 products, in an order that the processor chooses; they and their
        # log-sum-exp are below 16 here, and a sum may be half a last place off at each addition.
        np.testing.assert_allclose(
            whole.view(torch.float32)[:, floats],
            in_chunks_of_16.view(torch.float32)[:, floats],
            rtol=0,
            atol=16 * np.spacing(np.float32(8)),
        )

    async def test_a_minimal_query(self, vllm_engine: VllmEngine, reference: HfEngine) -> None:
        query = ScoreQuery(
            token_ids=random_ids(21, 2), first_row=1, candidate_ids=None, k=1, temperature=1.0
        )
        rows, expected = await vllm_engine.score(query), await reference.score(query)
        assert rows.topk_ids.shape == (1, 1)
        assert rows.candidate_logprobs is rows.entropies is rows.token_ranks is None
        np.testing.assert_allclose(rows.token_logprobs, expected.token_logprobs, atol=TOLERANCE)

    async def test_a_prompt_longer_than_one_step(
        self, vllm_engine: VllmEngine, reference: HfEngine
    ) -> None:
        token_ids = random_ids(22, 900)
        assert len(token_ids) > 3 * MAX_BATCHED_TOKENS
        for first_row in (1, 500, 899):
            query = a_query(token_ids, first_row)
            assert_same_rows(await vllm_engine.score(query), await reference.score(query))
            await reset(vllm_engine)

    async def test_kv_use_is_that_of_queries_under_way(self, vllm_engine: VllmEngine) -> None:
        """One of a single step too: after a step vLLM has freed what ended in it, so what it tells
        then read 0 at every scrape."""
        capacity = vllm_engine.kv_capacity_tokens() or 0
        assert capacity == pytest.approx(KV_CACHE_TOKENS, rel=0.05)
        assert vllm_engine.kv_used_ratio() == 0.0
        short, long = (a_query(random_ids(23, n), n - 1) for n in (BLOCK + 1, 900))
        asking = [asyncio.create_task(vllm_engine.score(query)) for query in (short, long)]
        await asyncio.sleep(0)
        needed = 2 * BLOCK + -(-900 // BLOCK) * BLOCK
        assert vllm_engine.kv_used_ratio() == pytest.approx(needed / capacity)
        await asyncio.gather(*asking)
        assert vllm_engine.kv_used_ratio() == 0.0

    async def test_queries_that_are_given_up_leave_no_kv_behind(
        self, vllm_engine: VllmEngine
    ) -> None:
        for delay_s in np.linspace(0.0, 0.05, 20):
            query = a_query(random_ids(24, 900), 1)
            asking = asyncio.create_task(vllm_engine.score(query))
            await asyncio.sleep(float(delay_s))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await vllm_engine.score(a_query(random_ids(25, 40), 1))
        assert kv_use(vllm_engine).used_ratio == 0.0, "as vLLM told, idle or not"

    @pytest.mark.parametrize(
        "bounds",
        [
            [BLOCK, 2 * BLOCK, 3 * BLOCK, 7 * BLOCK],
            [1, BLOCK, BLOCK + 1, 2 * BLOCK + 1, 4 * BLOCK],
            [2, 3, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 300],
            list(range(40, 75)),
        ],
    )
    @pytest.mark.parametrize("session", [None, "growing"])
    async def test_pieces_at_block_boundaries_equal_hf(
        self,
        vllm_engine: VllmEngine,
        reference: HfEngine,
        bounds: list[int],
        session: str | None,
    ) -> None:
        token_ids = random_ids(sum(bounds) + (session is None), bounds[-1])
        pieces = await grow(vllm_engine, token_ids, bounds, session=session)
        assert_same_rows(pieces, await reference.score(a_query(token_ids, bounds[0])))

    @pytest.mark.parametrize("seed", range(4))
    async def test_random_pieces_equal_hf(
        self, vllm_engine: VllmEngine, reference: HfEngine, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        length = int(rng.integers(300, MAX_CONTEXT))
        token_ids = random_ids(200 + seed, length)
        bounds = random_bounds(rng, int(rng.integers(1, 100)), length, 12)
        temperature = float(rng.choice([0.7, 1.0, 2.0]))
        pieces = await grow(
            vllm_engine, token_ids, bounds, temperature=temperature, session="growing"
        )
        expected = await reference.score(a_query(token_ids, bounds[0], temperature=temperature))
        assert_same_rows(pieces, expected)

    async def test_many_growing_sessions_equal_each_alone(
        self, vllm_engine: VllmEngine, reference: HfEngine
    ) -> None:
        """32 sessions of 300 tokens need twice the cache: they evict and preempt one another."""
        rng = np.random.default_rng(5)
        prompt = random_ids(300, 2 * BLOCK)
        sessions = [np.concatenate([prompt, random_ids(301 + i, 236)]) for i in range(32)]
        bounds = [random_bounds(rng, len(prompt), 300, 6) for _ in sessions]
        temperatures = rng.choice([0.7, 1.0, 2.0], len(sessions)).tolist()
        ks = rng.integers(3, 12, len(sessions)).tolist()
        together = await asyncio.gather(
            *(
                grow(vllm_engine, *session, temperature=temperature, k=k, session="growing")
                for *session, temperature, k in zip(sessions, bounds, temperatures, ks, strict=True)
            )
        )
        for rows, ids, temperature, k in zip(together, sessions, temperatures, ks, strict=True):
            query = a_query(ids, len(prompt), temperature=temperature, k=k)
            assert_same_rows(rows, await reference.score(query))

    @pytest.mark.parametrize("how", ["reset", "crowd out"])
    async def test_an_evicted_session_goes_on_midway(
        self, vllm_engine: VllmEngine, reference: HfEngine, how: str
    ) -> None:
        token_ids = random_ids(400, 700)
        await vllm_engine.score(a_query(token_ids[:500], 1))
        if how == "reset":
            await reset(vllm_engine)
        else:
            for other in range(KV_CACHE_TOKENS // 1000 + 1):
                await vllm_engine.score(a_query(random_ids(401 + other, 1000), 999))
        query = a_query(token_ids, 500)
        assert_same_rows(await vllm_engine.score(query), await reference.score(query))

    @pytest.mark.parametrize("first_row", [1, 31, 32, 33, 64, 65, 100, 255, 256, 257, 383, 384])
    async def test_rows_that_the_cache_reaches_beyond(
        self, vllm_engine: VllmEngine, reference: HfEngine, first_row: int
    ) -> None:
        """Another session has cached the same tokens, up to whole blocks and a bit more."""
        token_ids = random_ids(500, 400)
        await vllm_engine.score(a_query(token_ids, 399))
        for length in (385, 400):
            query = a_query(token_ids[:length], first_row)
            assert_same_rows(await vllm_engine.score(query), await reference.score(query))

    async def test_a_late_resume_recomputes_only_the_missing_blocks(
        self, vllm_engine: VllmEngine
    ) -> None:
        token_ids = random_ids(501, 1000)
        first = await vllm_engine.score(a_query(token_ids, 999))
        assert first.computed_tokens == 999
        submitted: list[int] = []
        submit = vllm_engine._submit

        async def counting(ids: list[int], *args: object, **kwargs: object) -> None:
            submitted.append(len(ids))
            await submit(ids, *args, **kwargs)

        vllm_engine._submit = counting
        try:
            again = await vllm_engine.score(a_query(token_ids, 900))
        finally:
            del vllm_engine._submit
        # Hidden states 899..991 lie in the blocks that end at 928, 960 and 992.
        assert submitted == [999, 992, 960, 928]
        assert again.computed_tokens == (999 - 992) + 3 * BLOCK

    async def test_whole_blocks_are_computed_once(
        self, vllm_engine: VllmEngine, reference: HfEngine
    ) -> None:
        token_ids = random_ids(502, 8 * BLOCK)
        bounds = [2 * BLOCK, 4 * BLOCK, 5 * BLOCK, 8 * BLOCK]
        with watched_requests(vllm_engine) as requests:
            pieces = await grow(vllm_engine, token_ids, bounds, session="growing")
            # Another session with the same prompt finds the prompt's last hidden state too.
            other_ids = np.concatenate([token_ids[: 2 * BLOCK], random_ids(503, BLOCK)])
            other = await vllm_engine.score(a_query(other_ids, 2 * BLOCK, session="another"))
        computed = [tokens - cached for tokens, cached in requests]
        assert computed == [4 * BLOCK, BLOCK, 3 * BLOCK, BLOCK]
        assert (pieces.computed_tokens, other.computed_tokens) == (8 * BLOCK, BLOCK)
        assert_same_rows(pieces, await reference.score(a_query(token_ids, bounds[0])))
        assert_same_rows(other, await reference.score(a_query(other_ids, 2 * BLOCK)))

    async def test_tenants_share_no_cached_prefix(
        self, vllm_engine: VllmEngine, reference: HfEngine
    ) -> None:
        token_ids = random_ids(504, 8 * BLOCK)
        expected = await reference.score(a_query(token_ids, 7 * BLOCK))
        found = []
        for salt in ("mine", "mine", "yours"):
            query = a_query(token_ids, 7 * BLOCK, cache_salt=salt)
            with watched_requests(vllm_engine) as requests:
                assert_same_rows(await vllm_engine.score(query), expected)
            found.append(requests[0][1])
        assert found == [0, 7 * BLOCK, 0]

    async def test_kept_states_are_bounded_and_the_least_used_go_first(self) -> None:
        import torch

        from teacher_server.engine import token_scorer

        kept, state_H = token_scorer.KeptStates(), torch.ones(1 << 20)
        room = token_scorer.KEPT_BYTES // state_H.nbytes
        for text in range(room):
            kept.keep(b"%d" % text, state_H)
        assert kept.recall(b"0") is not None
        kept.keep(b"one more", state_H)
        assert kept.recall(b"0") is not None
        assert kept.recall(b"1") is None
        assert kept.recall(b"2") is not None

    async def test_nan_is_an_error_and_poisons_no_one_else(
        self, vllm_engine: VllmEngine, reference: HfEngine
    ) -> None:
        poisoned = random_ids(600, 900)
        poisoned[70] = NAN_TOKEN_ID
        for _ in range(KV_CACHE_TOKENS // 900 + 1):
            with pytest.raises(NonFiniteError, match="not finite"):
                await vllm_engine.score(a_query(poisoned, 1))
            poisoned[0] = poisoned[0] % 500 + 1
        # Every block of the cache has held a NaN by now, and the next sessions fill blocks in part.
        for seed in range(3):
            token_ids = random_ids(601 + seed, 110)
            pieces = await grow(vllm_engine, token_ids, [1, 5, 40, 97, 110])
            assert_same_rows(pieces, await reference.score(a_query(token_ids, 1)))

    async def test_ids_that_take_no_part(
        self, vllm_engine: VllmEngine, reference: HfEngine
    ) -> None:
        """Side by side in one step, each request with its own."""
        excluded: list[Any] = [(), ((400, VOCAB_SIZE),), ((3, 4), (50, 90))]
        queries = [
            replace(a_query(random_ids(602, 120) % 40 + 5, 1), excluded_ids=ids) for ids in excluded
        ]
        queries = [replace(q, candidate_ids=q.candidate_ids % 40 + 5) for q in queries]
        for rows, query in zip(
            await asyncio.gather(*map(vllm_engine.score, queries)), queries, strict=True
        ):
            assert_same_rows(rows, await reference.score(query))

    async def test_passes_the_self_test(self, vllm_engine: VllmEngine) -> None:
        assert await self_test(vllm_engine) < 1e-3

    async def test_a_dead_engine_says_so(self, vllm_engine: VllmEngine) -> None:
        """The last test of the file: it ends the engine's process."""
        assert await vllm_engine.healthy()
        running = asyncio.create_task(vllm_engine.score(a_query(random_ids(700, 1000), 1)))
        await asyncio.sleep(0)
        for process in multiprocessing.active_children():
            if "EngineCore" in process.name:
                process.kill()
        with pytest.raises(EngineError):
            await running
        with pytest.raises(EngineError):
            await vllm_engine.score(a_query(random_ids(701, 10), 1))
        with pytest.raises(EngineError, match="vLLM has died: a process of it ended without a w"):
            await vllm_engine.healthy()
        assert vllm_engine._output is not None, "and what its front end says is in the file"
        assert "output_handler failed" in vllm_engine._output.path.read_text()


def kv_use(engine: VllmEngine) -> Any:
    """What listens to vLLM's statistics."""
    return engine._llm.logger_manager.stat_loggers[0]


@contextmanager
def watched_requests(engine: VllmEngine) -> Iterator[list[tuple[int, int]]]:
    """Of each request to vLLM its tokens, and those of them that were cached."""
    assert engine._llm is not None
    encode, requests = engine._llm.encode, []

    async def watched(prompt: Any, *args: object) -> AsyncIterator[Any]:
        async for output in encode(prompt, *args):
            requests.append((len(prompt["prompt_token_ids"]), output.num_cached_tokens))
            yield output

    engine._llm.encode = watched
    try:
        yield requests
    finally:
        del engine._llm.encode


async def reset(engine: VllmEngine) -> None:
    """Forgets every cached block; the only private access to the engine."""
    assert engine._llm is not None
    assert await engine._llm.reset_prefix_cache()
