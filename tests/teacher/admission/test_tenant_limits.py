"""What a tenant may take, and when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.access.tenants import OpenTenants, Tenant
from teacher_server.admission.tenant_limits import TenantLimits
from teacher_wire.errors import QuotaError, RateLimitedError


class OneKind:
    """Every tenant has these limits."""

    def __init__(self, **limits: int) -> None:
        self.limits = limits

    def get(self, name: str) -> Tenant:
        return Tenant(name=name, **self.limits)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_tokens_in_flight_are_bounded_and_come_back() -> None:
    limits = TenantLimits(OneKind(max_tokens_in_flight=100), clock=Clock())
    tenant = limits.admit("a", 60, tokens_per_s=1000.0)
    with pytest.raises(QuotaError, match=r"60 tokens .*'a'.* 41 more .* limit of 100") as caught:
        limits.admit("a", 41, tokens_per_s=1000.0)
    assert caught.value.retry_after_ms == 60
    limits.admit("b", 41, tokens_per_s=1000.0)
    limits.finish(tenant, 60, scored=True)
    limits.admit("a", 1000, tokens_per_s=1000.0)  # alone, a query may be larger


def test_a_hint_is_when_the_same_request_is_taken() -> None:
    clock = Clock()
    limits = TenantLimits(OneKind(tokens_per_minute=600), clock=clock)
    limits.admit("a", 600, tokens_per_s=1.0)
    with pytest.raises(RateLimitedError, match="600 tokens") as caught:
        limits.admit("a", 30, tokens_per_s=1.0)
    assert caught.value.retry_after_ms == 3000
    clock.now += 2.9
    with pytest.raises(RateLimitedError):
        limits.admit("a", 30, tokens_per_s=1.0)
    clock.now += 0.1001
    limits.admit("a", 30, tokens_per_s=1.0)


def test_what_never_reached_the_engine_is_not_paid_for() -> None:
    limits = TenantLimits(OneKind(tokens_per_minute=100), clock=Clock())
    for _ in range(10):
        tenant = limits.admit("a", 100, tokens_per_s=1.0)
        limits.finish(tenant, 100, scored=False)


@given(st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 30)), max_size=60))
def test_a_bucket_never_gives_more_than_its_rate_and_one_query(
    asks: list[tuple[int, float]],
) -> None:
    clock, rate = Clock(), 600
    limits = TenantLimits(OneKind(tokens_per_minute=rate), clock=clock)
    given_ = 0
    for tokens, pause in asks:
        clock.now += pause
        try:
            limits.admit("a", tokens, tokens_per_s=1.0)
        except RateLimitedError as error:
            clock.now += error.retry_after_ms / 1000
            limits.admit("a", tokens, tokens_per_s=1.0)
        given_ += tokens
        # A query larger than the bucket leaves a debt, which is less than that query.
        assert given_ <= rate + clock.now * rate / 60 + max(0, tokens - rate) + 1e-6


def test_changed_limits_hold_from_the_next_query_on() -> None:
    kind = OneKind(tokens_per_minute=100)
    limits = TenantLimits(kind, clock=Clock())
    limits.admit("a", 100, tokens_per_s=1.0)
    kind.limits = {}
    limits.admit("a", 1000, tokens_per_s=1.0)


def test_names_without_limits_leave_nothing_behind() -> None:
    limits = TenantLimits(OpenTenants(), clock=Clock())
    for index in range(100):
        tenant = limits.admit(f"t{index}", 10, tokens_per_s=1.0)
        limits.finish(tenant, 10, scored=True)
    assert len(limits) == 0
