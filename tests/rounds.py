"""How often each fault is tried: a short round in `make test`, a long one in `make faults`.

FAULT_ROUNDS=long chooses the second. FUZZ_CASES, which `make fuzz` sets, stands above both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Counts of one round."""

    server_kills: int
    connection_cuts: int
    client_kills: int
    trainer_kills: int
    clients_before: int
    """That come and go before the server's memory is measured."""
    memory_slack_bytes: int
    """By which memory goes up and down after so many of them."""
    fuzz_cases: int
    """Messages of all kinds together."""
    every_process: bool
    """Whether each case starts its own process of a second and more, or one case of each kind."""
    timed: bool
    """Whether times are judged too, which other work on the machine moves."""

    @property
    def timeout_s(self) -> float:
        """Of one test: for a hang, not for a slow machine."""
        return 600.0 + 4.0 * (self.server_kills + self.client_kills) + 0.1 * self.fuzz_cases


IN_TEST = Rounds(
    server_kills=15,
    connection_cuts=100,
    client_kills=15,
    trainer_kills=3,
    clients_before=100,
    memory_slack_bytes=1 << 20,
    fuzz_cases=1_500,
    every_process=False,
    timed=False,
)
LONG = Rounds(
    server_kills=500,
    connection_cuts=860,
    client_kills=500,
    trainer_kills=10,
    clients_before=1500,
    memory_slack_bytes=0,
    fuzz_cases=100_000,
    every_process=True,
    timed=True,
)


def chosen(environment: dict[str, str]) -> Rounds:
    """Raises ValueError for a round that is none."""
    name = environment.get("FAULT_ROUNDS", "test")
    rounds = {"test": IN_TEST, "long": LONG}
    if name not in rounds:
        raise ValueError(f"FAULT_ROUNDS is {name!r}, must be 'test' or 'long'")
    cases = int(environment.get("FUZZ_CASES", rounds[name].fuzz_cases))
    return replace(rounds[name], fuzz_cases=cases)


ROUNDS = chosen(dict(os.environ))
in_the_long_round = pytest.mark.skipif(not ROUNDS.every_process, reason="part of make faults")
"""For a case that differs from its neighbour in the moment or the engine, and starts a process."""
