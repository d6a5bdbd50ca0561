"""What a server process says of itself on /metrics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.faults.live_server import LiveServer
from tests.waiting import LIMIT_S


class Scrape:
    """One answer of /metrics."""

    def __init__(self, server: LiveServer) -> None:
        status, text = server.get("/metrics")
        assert status == 200
        self._samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name, frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """0 for a sample that is not there."""
        return self._samples.get((name, frozenset(labels.items())), 0.0)

    def by(self, name: str, *labels: str) -> Counter[Any]:
        """Values above 0 by one label, or by several."""
        found: Counter[Any] = Counter()
        for (sample, pairs), value in self._samples.items():
            if sample == name and value:
                key = tuple(dict(pairs)[label] for label in labels)
                found[key[0] if len(key) == 1 else key] += int(value)
        return found


async def scraped(server: LiveServer) -> Scrape:
    return await asyncio.to_thread(Scrape, server)


async def until(server: LiveServer, holds: Callable[[Scrape], bool]) -> Scrape:
    give_up = time.monotonic() + LIMIT_S
    while not holds(scrape := await scraped(server)):
        assert time.monotonic() < give_up, "did not happen in time"
        await asyncio.sleep(0.05)
    return scrape
