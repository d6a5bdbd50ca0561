"""How much of the work that may wait goes in beside the work that may not, where nobody is in line.
Pure.

A line is fair among those that stand in it; but a teacher has room for many queries at once, and
then there is no line. What may wait (analysis) is held back here instead: beside foreground work it
runs into debt for every token, and that is paid off by the tokens of the foreground, a share of
them for a tenant's weight. So background work gets at most its share of the tokens, and one query;
where the foreground has been silent for a while it owes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_PAID = 1e-6
"""Tokens by which rounding may miss the end of a debt."""


@dataclass(slots=True)
class _Present:
    """A tenant with foreground work in the engine or in line."""

    queries: int
    weight: float


class Pace:
    """The debts of tenants' background work."""

    def __init__(self, *, share: float, quiet_s: float, clock: Callable[[], float]) -> None:
        """`share` of a tenant's weight is what its background work weighs; quiet_s after the last
        foreground work of which more was to come there is none to wait for."""
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share is {share}, must be in (0, 1]")
        self._share = share
        self._quiet_s = quiet_s
        self._clock = clock
        self._present: dict[str, _Present] = {}
        self._silent_since = -math.inf
        self._debts: dict[str, float] = {}

    def allows(self, tenant: str) -> bool:
        """Whether a background query of the tenant may go on."""
        return self._is_quiet() or self._debts.get(tenant, 0.0) <= _PAID

    def arrive(self, tenant: str, weight: float) -> None:
        """A foreground query is there."""
        held = self._present.get(tenant)
        if held is None:
            self._present[tenant] = _Present(1, weight)
        else:
            held.queries += 1
            held.weight = weight

    @property
    def has_foreground(self) -> bool:
        """Whether a foreground query is there."""
        return bool(self._present)

    def leave(self, tenant: str, *, more_follows: bool = True) -> None:
        """A foreground query has ended, however."""
        held = self._present[tenant]
        held.queries -= 1
        if not held.queries:
            del self._present[tenant]
        if more_follows:
            self._silent_since = self._clock()

    def foreground(self, tokens: int, weight_of: Callable[[str], float]) -> None:
        """So many tokens of a foreground query go to the engine: debts are paid off."""
        if not self._debts:
            return
        total = sum(held.weight for held in self._present.values())
        for tenant in list(self._debts):
            left = self._debts[tenant] - tokens * self._share * weight_of(tenant) / total
            if left > _PAID:
                self._debts[tenant] = left
            else:
                del self._debts[tenant]

    def background(self, tenant: str, tokens: int) -> None:
        """So many tokens of a background query go to the engine."""
        if self._is_quiet():
            self._debts.clear()
        else:
            self._debts[tenant] = self._debts.get(tenant, 0.0) + tokens

    def _is_quiet(self) -> bool:
        return not self._present and self._clock() - self._silent_since >= self._quiet_s
