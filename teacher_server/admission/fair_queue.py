"""Whose turn it is: weighted deficit round robin over tenants, counted in tokens. Pure.

Tenants that wait take turns. A turn adds quantum x weight tokens to the tenant's balance, and its
items leave while the balance pays for the first of them. So tenants that keep waiting get tokens in
proportion to their weights, at most one item and one quantum apart, however large their items and
however many they have in line. A tenant that has nothing in line keeps no balance.

A decision costs at most three looks a waiting tenant, and none for the length of a line: rounds in
which nobody can pay are skipped by arithmetic.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Line(Generic[T]):
    """What one tenant has waiting."""

    items: dict[T, int] = field(default_factory=dict)
    """Tokens of each item, in order of arrival."""
    tokens: int = 0
    weight: float = 1.0
    balance: float = 0.0
    """Tokens that may leave in the present turn, or are left over from the last one."""
    in_turn: bool = False

    @property
    def first_tokens(self) -> int:
        return next(iter(self.items.values()))


class FairQueue(Generic[T]):
    """Items of many tenants, in fair order. Items are hashable and unique."""

    def __init__(self, *, quantum_tokens: int = 1) -> None:
        """A turn of a tenant with weight 1 is worth quantum_tokens. A tenant that has one item at a
        time in line loses what is left of its turn, so anything above 1 costs it some share."""
        if quantum_tokens < 1:
            raise ValueError(f"quantum_tokens is {quantum_tokens}, must be at least 1")
        self._quantum = quantum_tokens
        self._lines: OrderedDict[str, _Line[T]] = OrderedDict()
        """The first is in turn, or next."""
        self._tokens = 0
        self.num_looks = 0
        """Tenants looked at so far, which is what decisions have cost."""

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __len__(self) -> int:
        """Items waiting, of all tenants."""
        return sum(len(line.items) for line in self._lines.values())

    @property
    def tokens(self) -> int:
        """Tokens waiting, of all tenants."""
        return self._tokens

    def tokens_of(self, tenant: str) -> int:
        """Tokens that one tenant has waiting."""
        line = self._lines.get(tenant)
        return 0 if line is None else line.tokens

    def push(self, tenant: str, item: T, tokens: int, *, weight: float = 1.0) -> None:
        """Adds an item at the end of the tenant's line; the latest weight counts."""
        if not 0.0 < weight < math.inf:
            raise ValueError(f"the weight of {tenant!r} is {weight}, must be finite and > 0")
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line()
        line.weight = weight
        line.items[item] = tokens
        line.tokens += tokens
        self._tokens += tokens

    def remove(self, tenant: str, item: T) -> bool:
        """Takes an item out of its line; False when it is not there."""
        line = self._lines.get(tenant)
        if line is None or item not in line.items:
            return False
        self._take(tenant, line, item)
        return True

    def peek(self) -> T | None:
        """The item whose turn it is, None when nothing waits. It stays until `pop`."""
        if not self._lines:
            return None
        return next(iter(self._in_turn()[1].items))

    def pop(self) -> T:
        """Takes out the item whose turn it is. Raises IndexError when nothing waits."""
        if not self._lines:
            raise IndexError("pop from an empty queue")
        tenant, line = self._in_turn()
        item = next(iter(line.items))
        # A tenant alone goes on without paying, and owes nothing when another one comes.
        line.balance = max(0.0, line.balance - line.items[item])
        self._take(tenant, line, item)
        return item

    def _take(self, tenant: str, line: _Line[T], item: T) -> None:
        tokens = line.items.pop(item)
        line.tokens -= tokens
        self._tokens -= tokens
        if not line.items:
            del self._lines[tenant]

    def _in_turn(self) -> tuple[str, _Line[T]]:
        """The tenant that may send its first item now."""
        passed = 0
        while True:
            tenant, line = next(iter(self._lines.items()))
            self.num_looks += 1
            if not line.in_turn:
                line.in_turn = True
                line.balance += self._quantum * line.weight
            if line.first_tokens <= line.balance or len(self._lines) == 1:
                return tenant, line
            line.in_turn = False
            self._lines.move_to_end(tenant)
            passed += 1
            if passed == len(self._lines):
                self._skip_rounds()

    def _skip_rounds(self) -> None:
        """Gives everybody the turns that would pass before the first of them can pay."""
        rounds = min(
            math.ceil((line.first_tokens - line.balance) / (self._quantum * line.weight))
            for line in self._lines.values()
        )
        self.num_looks += len(self._lines)
        for line in self._lines.values():
            line.balance += (rounds - 1) * self._quantum * line.weight
