"""Sessions are caches that never change a row."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.access.tenants import Tenant
from teacher_server.engine.fake_engine import Fault
from teacher_wire.drift_metrics import METRICS, DriftMetric
from teacher_wire.errors import (
    CapacityError,
    EngineError,
    NonFiniteError,
    QuotaError,
    SessionNotFoundError,
    SessionOffsetError,
)
from teacher_wire.records import (
    DriftPolicy,
    DriftState,
    ScoreOptions,
    TokenSpan,
    Verdict,
)
from tests.teacher.scoring.fake_rows import (
    VOCAB,
    assert_rows_equal,
    assert_same_response,
    cut,
    make_span,
)
from tests.teacher.scoring.session_tables import OPTIONS, POLICY, PROMPT, STRICT, Table


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 59), max_size=4, unique=True).map(sorted),
    metric=st.sampled_from([metric(k=8) for metric in METRICS.values()]),
    w_drop=st.sampled_from([0.01, 0.1, 0.5]),
)
def test_appended_pieces_equal_the_whole(
    cuts: list[int], metric: DriftMetric, w_drop: float
) -> None:
    async def check() -> None:
        table, span = Table(), make_span(60)
        policy = replace(POLICY, metric=metric, w_drop=w_drop)
        table.open(policy=policy)
        bounds = [0, *cuts, 60]
        parts = [await table.append(cut(span, start, stop)) for start, stop in pairwise(bounds)]
        whole = await table.sessions.score_once(PROMPT, span, OPTIONS, policy, tenant="t")
        assert_same_response(parts, whole)

    asyncio.run(check())


@pytest.mark.parametrize("length", [0, 1, 13, 40])
async def test_rewind_then_append_equals_fresh(length: int) -> None:
    table, old, new = Table(), make_span(40, seed=1), make_span(60, seed=2)
    joined = TokenSpan(
        offset=0,
        token_ids=np.concatenate([old.token_ids[:length], new.token_ids[length:]]),
        candidate_ids=np.concatenate([old.candidate_ids[:length], new.candidate_ids[length:]]),  # type: ignore[index]
        event_mask=np.concatenate([old.event_mask[:length], new.event_mask[length:]]),  # type: ignore[index]
    )
    table.open()
    first = await table.append(old)
    second = await table.append(cut(new, length, 60))
    whole = await table.whole(joined)
    assert second.drift == whole.drift
    assert (second.verdict, second.keep_tokens) == (whole.verdict, whole.keep_tokens)
    np.testing.assert_array_equal(
        np.concatenate([first.rows.topk_ids[:length], second.rows.topk_ids]), whole.rows.topk_ids
    )


async def test_a_repeated_append_gives_the_same_answer() -> None:
    table, span = Table(), make_span(30)
    table.open()
    first = await table.append(span)
    again = await table.append(span)
    assert_same_response([again], first)


async def test_resuming_elsewhere_goes_on_as_if_nothing_had_happened() -> None:
    span = make_span(60)
    one, other = Table(), Table()
    one.open()
    first = await one.append(cut(span, 0, 25))
    next_offset = other.open(scored_ids=span.token_ids[:25], drift_state=first.drift)
    assert next_offset == 25
    second = await other.append(cut(span, 25, 60))
    assert_same_response([first, second], await one.whole(span))


async def test_a_gap_names_the_expected_offset_and_changes_nothing() -> None:
    table, span = Table(), make_span(30)
    table.open()
    await table.append(cut(span, 0, 10))
    with pytest.raises(SessionOffsetError) as caught:
        await table.append(cut(span, 20, 30))
    assert (caught.value.expected_offset, caught.value.offset) == (10, 20)
    assert len((await table.append(cut(span, 10, 30))).rows) == 20


async def test_rewinding_below_a_resume_needs_a_new_open() -> None:
    table, span = Table(), make_span(30)
    table.open(scored_ids=span.token_ids[:20], drift_state=DriftState(num_tokens=20))
    with pytest.raises(SessionOffsetError, match="opened at 20") as caught:
        await table.append(cut(span, 10, 30))
    assert caught.value.expected_offset == 20


async def test_appends_after_truncate_are_answered_with_the_same_verdict() -> None:
    table, span = Table(), make_span(60)
    table.open(policy=DriftPolicy(metric=STRICT, w_drop=0.5))
    first = await table.append(cut(span, 0, 30))
    assert first.verdict is Verdict.TRUNCATE
    later = await table.append(cut(span, 30, 60))
    assert (later.verdict, later.keep_tokens) == (Verdict.TRUNCATE, first.keep_tokens)
    assert len(later.rows) == 30


async def test_keep_tokens_ends_at_the_last_bad_event_of_the_budget() -> None:
    table, span = Table(), make_span(60)
    table.open(policy=DriftPolicy(metric=STRICT, w_drop=0.1))
    scores = await table.append(span)
    bad = scores.rows.bad_events
    assert bad is not None
    assert scores.keep_tokens is not None
    assert bad[: scores.keep_tokens].sum() == 10
    assert bad[scores.keep_tokens - 1]


async def test_overlap_without_a_policy_compares_what_both_have() -> None:
    table, span = Table(), make_span(20, width=4)
    scores = await table.sessions.score_once(
        PROMPT, span, ScoreOptions(k=VOCAB // 8), None, tenant="t"
    )
    assert scores.drift is None
    assert scores.rows.bad_events is None
    assert scores.rows.overlap_counts is not None
    whole_vocabulary = replace(
        span, candidate_ids=np.tile(np.arange(64, dtype=np.int32), (20, 1)), event_mask=None
    )
    everything = await table.sessions.score_once(
        PROMPT, whole_vocabulary, ScoreOptions(k=64), None, tenant="t"
    )
    assert everything.rows.overlap_counts is not None
    assert (scores.rows.overlap_counts <= 4).all()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.RAISE, EngineError),
        (Fault.CRASH, EngineError),
        (Fault.NAN, NonFiniteError),
        (Fault.LEAK_NAN, NonFiniteError),
    ],
)
async def test_a_failed_append_changes_nothing(fault: Fault, error: type[Exception]) -> None:
    table, span = Table(), make_span(40)
    table.open()
    first = await table.append(cut(span, 0, 20))
    table.engine.inject(fault)
    with pytest.raises(error) as caught:
        await table.append(cut(span, 5, 40))
    assert "injected crash" not in str(caught.value)
    second = await table.append(cut(span, 20, 40))
    assert_same_response([first, second], await table.whole(span))


async def test_concurrent_appends_of_one_session_run_in_order() -> None:
    table, span = Table(), make_span(60)
    table.open()
    pieces = [table.append(cut(span, start, start + 10)) for start in range(0, 60, 10)]
    assert_same_response(list(await asyncio.gather(*pieces)), await table.whole(span))


async def test_a_long_response_is_scored_in_pieces() -> None:
    small, large = Table(max_append_tokens=7), Table()
    span = make_span(60)
    assert_same_response([await small.whole(span)], await large.whole(span))
    assert small.engine.num_queries == 9
    assert len(small.sessions) == 0
    assert len(small.engine.forgotten) == 1


async def test_open_replaces_and_close_forgets() -> None:
    table, span = Table(), make_span(20)
    table.open()
    await table.append(span)
    assert table.open() == 0
    assert len(table.sessions) == 1
    assert table.sessions.close("s", tenant="t")
    assert not table.sessions.close("s", tenant="t")
    assert list(table.engine.forgotten) == ["1:t/s"]
    with pytest.raises(SessionNotFoundError):
        await table.append(span)


async def test_sessions_that_are_gone_leave_no_memory() -> None:
    """About 70 bytes each were once kept by the engine, which a soak of 85,000 clients showed."""
    table, span = Table(), make_span(4)

    async def growth(first: int) -> int:
        """Of the memory in use, by 200 sessions."""
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for index in range(first, first + 200):
            name = f"session-with-a-name-of-its-own-{index}"
            table.open(name)
            await table.append(span, name)
            table.sessions.close(name, tenant="t")
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    kept = [await growth(1000 * number) for number in range(1, 9)]
    tracemalloc.stop()
    # A name kept would be 80 bytes in every round; what comes once comes in some of them.
    assert min(kept) < 40 * 200, kept


async def test_only_its_owner_ends_a_session_that_was_opened_again() -> None:
    table = Table()
    table.open(owner="old stream")
    table.open(owner="new stream")
    assert not table.sessions.close("s", tenant="t", owner="old stream")
    assert table.sessions.close("s", tenant="t", owner="new stream")


async def test_tenants_do_not_see_each_other() -> None:
    table = Table()
    table.open()
    with pytest.raises(SessionNotFoundError):
        await table.sessions.append("s", make_span(5), tenant="other")
    assert not table.sessions.close("s", tenant="other")


async def test_idle_sessions_expire() -> None:
    table = Table(ttl_s=60.0)
    table.open("old")
    table.clock.now += 40
    table.open("new")
    table.clock.now += 30
    assert table.sessions.expire() == 1
    with pytest.raises(SessionNotFoundError, match="expired"):
        await table.append(make_span(5), "old")
    await table.append(make_span(5), "new")


async def test_a_session_whose_stream_broke_ends_unless_it_is_opened_again() -> None:
    table, stream, next_stream = Table(), object(), object()
    for name in ("lost", "resumed", "elsewhere"):
        table.open(name, owner=stream)
    table.open("elsewhere", owner=next_stream)
    table.sessions.detach(["lost", "resumed", "elsewhere"], tenant="t", owner=stream)
    table.clock.now += 0.9
    table.open("resumed", owner=next_stream)
    assert len(table.sessions) == 3
    table.clock.now += 0.2
    assert table.sessions.expire() == 1
    with pytest.raises(SessionNotFoundError):
        await table.append(make_span(5), "lost")
    await table.append(make_span(5), "resumed")
    await table.append(make_span(5), "elsewhere")
    assert list(table.engine.forgotten) == ["1:t/lost"]


async def test_the_least_recently_used_idle_session_makes_room() -> None:
    table = Table(max_sessions=2, evict_idle_s=5.0)
    table.open("a")
    table.open("b")
    with pytest.raises(CapacityError, match="limit is 2") as caught:
        table.open("c")
    assert caught.value.retry_after_ms > 0
    table.clock.now += 6
    await table.append(make_span(5), "a")
    table.open("c")
    await table.append(make_span(5), "a")
    with pytest.raises(SessionNotFoundError):
        await table.append(make_span(5), "b")


async def test_an_append_that_took_long_hides_no_session_that_is_idle_for_longer() -> None:
    table = Table(max_sessions=2, evict_idle_s=5.0)
    running = await table.busy("slow")
    table.open("idle")
    table.clock.now += 10
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    table.open("next")
    assert list(table.engine.forgotten) == ["1:t/idle"]


async def test_a_full_table_takes_from_whoever_has_most() -> None:
    table = Table(max_sessions=4, evict_idle_s=0.0)

    def evicted_for(tenant: str, name: str) -> list[str]:
        table.clock.now += 1
        table.engine.forgotten.clear()
        table.open(name, tenant=tenant)
        return [engine_name.partition(":")[2] for engine_name in table.engine.forgotten]

    assert evicted_for("modest", "m1") == []
    for name in ("g1", "g2", "g3"):
        assert evicted_for("greedy", name) == []
    assert evicted_for("greedy", "g4") == ["greedy/g1"]  # though m1 is idle for longer
    assert evicted_for("modest", "m2") == ["greedy/g2"]
    assert evicted_for("third", "t1") == ["modest/m1"]  # two each: the one idle for longest
    assert evicted_for("greedy", "g5") == ["greedy/g3"]


async def test_a_tenant_with_everything_in_use_takes_nothing_from_the_others() -> None:
    table = Table(max_sessions=2, evict_idle_s=0.0)
    table.open("idle", tenant="modest")
    running = await table.busy()
    with pytest.raises(CapacityError):
        table.open("more")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_busy_session_is_never_evicted() -> None:
    table = Table(max_sessions=1, evict_idle_s=0.0)
    running = await table.busy()
    with pytest.raises(CapacityError):
        table.open("next")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    table.clock.now += 1
    table.open("next")


async def test_tenants_below_their_even_share_find_room_when_all_sessions_are_in_use() -> None:
    table = Table(max_sessions=16, evict_idle_s=0.0)
    running = [await table.busy(f"g{i}", "greedy") for i in range(16)]
    for name, tenant in (("m1", "modest"), ("o1", "other")):
        with pytest.raises(CapacityError, match="limit is 16"):
            table.open("more", tenant="greedy")
        running.append(await table.busy(name, tenant))
    with pytest.raises(CapacityError, match="18 sessions are open"):
        table.open("m2", tenant="modest")  # no more than an eighth beyond the limit
    for ended in range(2):
        table.sessions.close(f"g{ended}", tenant="greedy")
        with pytest.raises(CapacityError):
            table.open("more", tenant="greedy")  # its places go to the others first
    assert len(table.sessions) == 16
    for name in ("m2", "m3"):
        running.append(await table.busy(name, "modest"))
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@settings(max_examples=50, deadline=None)
@given(
    limit=st.integers(1, 20),
    moves=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=80),
)
def test_places_beyond_the_limit_are_an_eighth_and_for_tenants_below_their_even_share(
    limit: int, moves: list[tuple[str, bool]]
) -> None:
    """Any order of opens and closes; every session is in use while it is open."""
    table = Table(max_sessions=limit, evict_idle_s=0.0)
    held: dict[str, list[str]] = {name: [] for name in "abc"}
    most = limit + max(1, limit // 8)
    for number, (tenant, opens) in enumerate(moves):
        own, num_open, name = held[tenant], len(table.sessions), f"{number}"
        if not opens:
            if own:
                table.sessions.close(own.pop(), tenant=tenant)
            continue
        num_tenants = sum(1 for names in held.values() if names) + (not own)
        if num_open < limit or (num_open < most and len(own) < limit / num_tenants):
            table.open(name, tenant=tenant)
            table.sessions._sessions[tenant, name].num_pending += 1
            own.append(name)
        else:
            with pytest.raises(CapacityError):
                table.open(name, tenant=tenant)
        table.clock.now += 1
        assert len(table.sessions) == sum(map(len, held.values())) <= most


class Allowed:
    """Every tenant may have so many sessions."""

    def __init__(self, max_sessions: int) -> None:
        self.max_sessions = max_sessions

    def get(self, name: str) -> Tenant:
        return Tenant(name=name, max_sessions=self.max_sessions)


async def test_what_a_tenant_has_stays_its_own_when_its_limit_is_lowered() -> None:
    allowed = Allowed(2)
    table = Table(tenants=allowed)
    table.open("a")
    table.open("b")
    allowed.max_sessions = 1
    with pytest.raises(QuotaError):
        table.open("c")
    table.open("a")
    assert len(table.sessions) == 2


async def test_metrics_equal_what_was_done() -> None:
    table = Table()
    table.open()
    await table.append(make_span(30))
    value = table.metrics.registry.get_sample_value
    assert value("teacher_tokens_scored_total", {"tenant": "t"}) == 30
    assert value("teacher_sessions", {"state": "open"}) == 1
    table.sessions.close("s", tenant="t")
    assert value("teacher_sessions", {"state": "open"}) == 0


async def test_rows_of_a_half_precision_session_are_full_precision_here() -> None:
    table, span = Table(), make_span(5)
    table.open()
    scores = await table.append(span)
    assert scores.rows.topk_logprobs.dtype == np.float32
    assert_rows_equal(scores.rows, (await table.whole(span)).rows)
