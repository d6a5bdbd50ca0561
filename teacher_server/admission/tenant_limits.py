"""What each tenant has taken of its own limits: tokens in flight, and tokens of this minute. Pure.

A tenant is asked for by name at every admission, so that changed limits hold from the next one on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from teacher_server.access.tenants import Tenant, Tenants
from teacher_wire.errors import QuotaError, RateLimitedError

_MINUTE_S = 60.0
_ROUNDING_TOKENS = 1e-6
"""A query that comes back exactly when it was told to is not sent away again."""
MIN_HINT_MS, MAX_HINT_MS = 50, 10_000
"""Range of a hint that is estimated; what a bucket needs is known and may be longer."""


def hint_ms(tokens: float, tokens_per_s: float) -> int:
    """Time for so many tokens to be worked off, as a retry hint."""
    return min(max(int(1000 * tokens / tokens_per_s), MIN_HINT_MS), MAX_HINT_MS)


@dataclass(slots=True)
class _Account:
    """What one tenant has taken."""

    in_flight: int = 0
    """New tokens that wait for the engine or are in it."""
    bucket: float = math.inf
    """Tokens that may still be admitted; below 0 after one query larger than the bucket."""
    filled_at: float = 0.0


class TenantLimits:
    """Admits tokens of tenants, and takes note of them until they are done."""

    def __init__(self, tenants: Tenants, *, clock: Callable[[], float]) -> None:
        self._tenants = tenants
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def __len__(self) -> int:
        """Tenants with anything on their account."""
        return len(self._accounts)

    def admit(self, name: str, tokens: int, *, tokens_per_s: float) -> Tenant:
        """The tenant, with `tokens` booked until `finish`; tokens_per_s is the engine's speed.

        A query alone may be larger than a limit. Raises QuotaError or RateLimitedError with a hint.
        """
        tenant = self._tenants.get(name)
        account = self._accounts.get(name) or _Account(filled_at=self._clock())
        limit = tenant.max_tokens_in_flight
        if limit is not None and account.in_flight and account.in_flight + tokens > limit:
            raise QuotaError(
                f"{account.in_flight} tokens of tenant {name!r} are in flight and {tokens} more "
                f"pass its limit of {limit}",
                retry_after_ms=hint_ms(account.in_flight, tokens_per_s),
            )
        self._pay(tenant, account, tokens)
        account.in_flight += tokens
        self._accounts[name] = account
        return tenant

    def finish(self, tenant: Tenant, tokens: int, *, scored: bool) -> None:
        """Ends what `admit` began; tokens that never reached the engine go back to the bucket."""
        account = self._accounts[tenant.name]
        account.in_flight -= tokens
        if not scored:
            account.bucket += tokens
        if not account.in_flight and tenant.tokens_per_minute is None:
            # Names are the clients' choice where nothing authenticates: nothing is kept of them.
            del self._accounts[tenant.name]

    def _pay(self, tenant: Tenant, account: _Account, tokens: int) -> None:
        limit = tenant.tokens_per_minute
        now = self._clock()
        if limit is None:
            account.bucket, account.filled_at = math.inf, now
            return
        gained = (now - account.filled_at) * limit / _MINUTE_S
        account.bucket, account.filled_at = min(float(limit), account.bucket + gained), now
        needed = min(tokens, limit)
        if account.bucket < needed - _ROUNDING_TOKENS:
            wait_s = (needed - account.bucket) * _MINUTE_S / limit
            raise RateLimitedError(
                f"tenant {tenant.name!r} has had its {limit} tokens of this minute; "
                f"{tokens} more are possible in {wait_s:.1f} s",
                retry_after_ms=math.ceil(wait_s * 1000),
            )
        account.bucket -= tokens
