"""Fair turns as laws, over any backlog. Run: pytest tests/teacher/admission/test_fair_queue.py"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.admission.fair_queue import FairQueue

MAX_TOKENS = 4096
WEIGHTS = {"a": 1.0, "b": 0.25, "c": 3.0, "d": 1.0}


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    tenant: str
    tokens: int


tenants = st.sampled_from(sorted(WEIGHTS))
items = st.builds(Item, tenants, st.integers(1, MAX_TOKENS))
quanta = st.sampled_from([1, 16, 64, 5000])


def push(queue: FairQueue[Item], item: Item) -> None:
    queue.push(item.tenant, item, item.tokens, weight=WEIGHTS[item.tenant])


def shares_apart(served: Counter[str], waiting: set[str], quantum: int, num_items: int) -> None:
    """No two of these tenants are further apart than the law allows, each by its weight."""
    for left, right in combinations(sorted(waiting), 2):
        apart = abs(served[left] / WEIGHTS[left] - served[right] / WEIGHTS[right])
        lightest = min(WEIGHTS[left], WEIGHTS[right])
        # The sums of floats may be off by far less than a token.
        assert apart <= quantum + num_items * MAX_TOKENS / lightest + 1e-6


@given(st.lists(items, min_size=1, max_size=200), quanta)
def test_shares_of_a_backlog_differ_by_one_query_and_one_quantum(
    backlog: list[Item], quantum: int
) -> None:
    queue: FairQueue[Item] = FairQueue(quantum_tokens=quantum)
    for item in backlog:
        push(queue, item)
    left, served = Counter(item.tenant for item in backlog), Counter[str]()
    while all(left.values()) and queue:
        item = queue.pop()
        served[item.tenant] += item.tokens
        left[item.tenant] -= 1
        shares_apart(served, set(left), quantum, 1)


@given(st.lists(st.one_of(items, st.none()), max_size=300), quanta)
def test_shares_are_fair_from_any_moment_on(steps: list[Item | None], quantum: int) -> None:
    """Whatever was before: what waits without a pause gets its share, one more query apart."""
    queue: FairQueue[Item] = FairQueue(quantum_tokens=quantum)
    waiting, served, since = Counter[str](), Counter[str](), set[str]()
    for step in steps:
        if step is not None:
            push(queue, step)
            waiting[step.tenant] += 1
        elif queue:
            item = queue.pop()
            waiting[item.tenant] -= 1
            served[item.tenant] += item.tokens
        now = {tenant for tenant, count in waiting.items() if count}
        if not since <= now or len(now) < 2:
            since, served = now, Counter[str]()  # a new moment to count from
        else:
            shares_apart(served, since, quantum, 2)


@given(st.lists(st.one_of(items, st.integers(0, 400)), max_size=200), quanta)
def test_nothing_is_lost_or_invented_and_lines_keep_their_order(
    steps: list[Item | int], quantum: int
) -> None:
    queue: FairQueue[Item] = FairQueue(quantum_tokens=quantum)
    inside: list[Item] = []
    for step in steps:
        if isinstance(step, Item):
            push(queue, step)
            inside.append(step)
        elif step < len(inside) and step % 3 == 0:
            gone = inside.pop(step)
            assert queue.remove(gone.tenant, gone)
            assert not queue.remove(gone.tenant, gone)
        elif inside:  # work-conserving: while anything waits, something is next
            coming = queue.peek()
            item = queue.pop()
            assert item is coming
            assert item is next(other for other in inside if other.tenant == item.tenant)
            inside.remove(item)
        assert queue.tokens == sum(item.tokens for item in inside)
        for tenant in WEIGHTS:
            own = sum(item.tokens for item in inside if item.tenant == tenant)
            assert queue.tokens_of(tenant) == own
    assert bool(queue) == bool(inside)
    assert queue.peek() is None or inside


@given(st.integers(1, MAX_TOKENS), st.integers(1, MAX_TOKENS), st.sampled_from([0.01, 1.0, 50.0]))
@settings(deadline=None)
def test_nobody_starves_behind_a_tenant_that_never_stops(
    own: int, greedy: int, weight: float
) -> None:
    queue: FairQueue[Item] = FairQueue()
    mine = Item("mine", own)
    queue.push("greedy", Item("greedy", greedy), greedy)
    queue.push("mine", mine, own, weight=weight)
    passed = 0
    while (item := queue.pop()) is not mine:
        passed += item.tokens
        queue.push("greedy", Item("greedy", greedy), greedy)
        assert passed <= own / weight + 1 + greedy


def test_a_tenant_with_one_item_at_a_time_gets_every_second_place() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(40):
        push(queue, Item("a", 64))
    order = []
    for _ in range(10):
        order.append(queue.pop().tenant)
        if not queue.tokens_of("d"):
            push(queue, Item("d", 64))
    assert order == ["a", "d"] * 5


def test_idleness_earns_nothing() -> None:
    queue: FairQueue[Item] = FairQueue()
    for round_ in range(50):  # c comes and goes, with room for more than it sends
        push(queue, Item("c", 1))
        queue.pop()
        if round_ % 2:
            push(queue, Item("a", 1))
            queue.pop()
    for _ in range(20):
        push(queue, Item("a", 48))
        push(queue, Item("c", 48))
    first = [queue.pop().tenant for _ in range(8)]
    assert first.count("c") == 6  # three to one, and no more for having been idle


@pytest.mark.parametrize("length", [1, 1000])
@pytest.mark.parametrize("tokens", [16, MAX_TOKENS])
def test_a_decision_costs_as_much_in_a_long_line_as_in_a_short_one(
    length: int, tokens: int
) -> None:
    queue: FairQueue[Item] = FairQueue(quantum_tokens=16)
    names = [f"t{i}" for i in range(20)]
    for name in names:
        for _ in range(length):
            queue.push(name, Item(name, tokens), tokens)
    most = 0
    for _ in range(20 * length):
        before = queue.num_looks
        queue.pop()
        most = max(most, queue.num_looks - before)
    assert most <= (2 if tokens <= 16 else 3 * len(names) + 2)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    queue: FairQueue[Item] = FairQueue()
    with pytest.raises(ValueError, match="weight"):
        queue.push("a", Item("a", 1), 1, weight=weight)
    with pytest.raises(IndexError):
        queue.pop()
