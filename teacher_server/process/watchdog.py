"""Judges an engine by its answers. Knows no transport and no model.

An engine is silent while it owes answers and gives none. After `stall_s` of silence the server is
not serving, after `lost_s` it is beyond repair: a hung device does not come back, and only a new
process helps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import numpy as np

from teacher_server.engine.base import EngineInfo, EngineRows, ScoreQuery, ScoringEngine
from teacher_server.process.lifecycle import Lifecycle, Phase
from teacher_wire.errors import EngineError

log = logging.getLogger(__name__)
_LONGEST_INTERVAL_S = 1.0
_LAG_INTERVAL_S = 0.25
_PROBE = ScoreQuery(
    token_ids=np.zeros(2, np.int32), first_row=1, candidate_ids=None, k=1, temperature=1.0
)


class WatchedEngine:
    """An engine that knows how much it owes and for how long it has been silent."""

    def __init__(
        self, engine: ScoringEngine, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._silent_s = 0.0
        """Silence before `_since`."""
        self._since = 0.0
        self.num_running = 0
        """Queries in the engine."""
        self.running_tokens = 0
        """New tokens in the engine."""

    def silent_s(self) -> float:
        """Time that the engine has owed answers since it last gave one, in seconds.

        Time with no query in it does not count. Queries that are cancelled are no answers: the
        silence of an engine whose clients give up and ask again adds up.
        """
        owing = self._clock() - self._since if self.num_running else 0.0
        return self._silent_s + owing

    async def score(self, query: ScoreQuery) -> EngineRows:
        tokens = len(query.token_ids) - query.first_row
        if not self.num_running:
            self._since = self._clock()
        self.num_running += 1
        self.running_tokens += tokens
        try:
            rows = await self._engine.score(query)
        except asyncio.CancelledError:
            if self.num_running == 1:
                self._silent_s += self._clock() - self._since
            raise
        except Exception:
            self._answered()
            raise
        else:
            self._answered()
            return rows
        finally:
            self.num_running -= 1
            self.running_tokens -= tokens

    def _answered(self) -> None:
        self._silent_s = 0.0
        self._since = self._clock()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    async def start(self) -> None:
        await self._engine.start()

    def forget(self, session: str) -> None:
        self._engine.forget(session)

    async def healthy(self) -> bool:
        return await self._engine.healthy()

    def kv_used_ratio(self) -> float | None:
        return self._engine.kv_used_ratio()

    def kv_capacity_tokens(self) -> int | None:
        return self._engine.kv_capacity_tokens()

    async def close(self) -> None:
        await self._engine.close()


class Watchdog:
    """Moves a server between serving, stalled and lost."""

    def __init__(
        self, engine: WatchedEngine, lifecycle: Lifecycle, *, stall_s: float, lost_s: float
    ) -> None:
        self._engine = engine
        self._lifecycle = lifecycle
        self._stall_s = stall_s
        self._lost_s = lost_s
        self._interval_s = min(_LONGEST_INTERVAL_S, stall_s / 4)
        self._probe: asyncio.Task[EngineRows] | None = None

    async def run(self) -> None:
        """Looks every second, or four times within stall_s if that is more often."""
        try:
            while not self._lifecycle.ending.is_set():
                await asyncio.sleep(self._interval_s)
                await self._look()
        finally:
            if self._probe is not None:
                self._probe.cancel()
                await asyncio.gather(self._probe, return_exceptions=True)

    async def _look(self) -> None:
        silent_s = self._engine.silent_s()
        if silent_s > self._lost_s:
            self._lifecycle.lose(f"the engine has been silent for {silent_s:.1f} s")
            return
        try:
            healthy, why = await self._is_healthy(), ""
        except EngineError as error:
            healthy, why = False, f": {error}"
        if not healthy:
            self._lifecycle.lose(f"the engine says that it cannot score any more{why}")
            return
        stalled = silent_s > self._stall_s
        if stalled and self._lifecycle.phase is Phase.SERVING:
            log.warning("the engine has been silent for %.1f s", silent_s)
        self._lifecycle.enter(Phase.STALLED if stalled else Phase.SERVING)
        if stalled and not self._engine.num_running:
            # Nobody asks a server that is not serving: without this it would stay so for ever.
            self._probe = asyncio.create_task(self._engine.score(_PROBE))

    async def _is_healthy(self) -> bool:
        """An engine too hung to say is judged by its silence."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval_s):
                return await self._engine.healthy()
        return True


async def sample_loop_lag(observe: Callable[[float], None]) -> None:
    """Tells four times a second how late the event loop was, in seconds; never returns."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        observe(max(0.0, loop.time() - due))
