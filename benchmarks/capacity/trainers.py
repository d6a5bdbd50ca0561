"""Simulated trainers: real clients, rollouts that grow by the clock, and learning that sleeps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from benchmarks.capacity.arithmetic import TrainerLoad
from teacher_client.client import TeacherClient, TeacherSession
from teacher_wire.errors import TeacherError
from teacher_wire.records import LogprobDtype, ScoreOptions, TokenSpan

OPTIONS = ScoreOptions(k=4, logprob_dtype=LogprobDtype.F16)
PROMPT = np.ones(1, np.int32)
"""The fake engine takes no time for a prompt."""


@dataclass(slots=True)
class Seen:
    """What one or several trainers have asked for and got."""

    rows_asked: int = 0
    rows_received: int = 0
    appends: int = 0
    append_s: float = 0.0
    """Of all appends together."""
    steps: int = 0
    rollouts: int = 0
    given_up_rows: int = 0
    """Asked for by appends whose trainer was ended before they were answered."""
    rows_under_way: int = 0
    """Asked for and not answered yet."""
    errors: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    longest: list[int] = field(default_factory=list)
    learnt_s: list[float] = field(default_factory=list)
    rollouts_s: list[float] = field(default_factory=list)

    @property
    def rows_lost(self) -> int:
        """Asked for, and never answered though their trainer was there."""
        answered = self.rows_received + self.given_up_rows + self.rows_under_way
        return self.rows_asked - answered

    def forget_times(self) -> None:
        """Counts and times begin anew, but for rows, some of which are under way."""
        self.appends, self.append_s, self.steps = 0, 0.0, 0
        for kept in (self.lengths, self.longest, self.learnt_s, self.rollouts_s):
            kept.clear()

    def drawn(self, load: TrainerLoad) -> TrainerLoad:
        """The load as it came out of the draw, which is what the arithmetic must answer for."""
        return TrainerLoad(
            rollouts=load.rollouts,
            tokens_per_s=load.tokens_per_s,
            response_tokens=fmean(self.lengths),
            longest_tokens=fmean(self.longest),
            chunk_tokens=load.chunk_tokens,
            learn_s=fmean(self.learnt_s),
        )


class SimulatedTrainer:
    """One trainer: steps of rollouts and learning, until it is told to end."""

    def __init__(
        self,
        client: TeacherClient,
        load: TrainerLoad,
        seen: Seen,
        *,
        seed: int,
        spread: float = 0.25,
    ) -> None:
        """Lengths are uniform within `spread` of their mean, learning takes from half to one and a
        half of its mean."""
        self._client = client
        self._load = load
        self._seen = seen
        self._rng = random.Random(seed)
        self._spread = spread
        self._killed = False

    async def kill(self) -> None:
        """Its connection goes away under its appends; no session is closed."""
        self._killed = True
        await self._client.aclose()

    async def steps(self, number: int | None = None) -> None:
        """So many steps; without a number until it is cancelled."""
        load, seen, rng = self._load, self._seen, self._rng
        # Trainers do not begin together.
        await asyncio.sleep(rng.random() * (load.learn_s + load.longest_tokens / load.tokens_per_s))
        done = 0
        while number is None or done < number:
            low, high = 1 - self._spread, 1 + self._spread
            lengths = [
                max(1, round(load.response_tokens * rng.uniform(low, high)))
                for _ in range(load.rollouts)
            ]
            loop = asyncio.get_running_loop()
            began = loop.time()
            await asyncio.gather(*(self._rollout(length) for length in lengths))
            seen.rollouts_s.append(loop.time() - began)
            seen.steps += 1
            seen.lengths += lengths
            seen.longest.append(max(lengths))
            done += 1
            learn_s = load.learn_s * rng.uniform(0.5, 1.5)
            seen.learnt_s.append(learn_s)
            await asyncio.sleep(learn_s)

    async def _rollout(self, length: int) -> None:
        """Grows by the clock; what is there is sent when the append before is answered, as the
        trainer's own rollouts do."""
        load, loop = self._load, asyncio.get_running_loop()
        token_ids = np.arange(length, dtype=np.int32) % self._client.info.vocab_size
        longest = self._client.info.max_append_tokens
        session = self._client.open(PROMPT, OPTIONS, None)
        began, scored = loop.time(), 0
        try:
            while scored < length:
                wanted = min(length, scored + load.chunk_tokens)
                while (there := self._there(loop.time() - began, length)) < wanted:
                    due = began + wanted / load.tokens_per_s
                    await asyncio.sleep(max(0.0005, due - loop.time()))
                end = min(there, scored + longest)
                await self._append(session, scored, token_ids[scored:end])
                scored = end
        finally:
            await session.close()
        self._seen.rollouts += 1

    def _there(self, seconds: float, length: int) -> int:
        # A little late is not early: clocks round.
        return min(length, int(seconds * self._load.tokens_per_s + 1e-6))

    async def _append(
        self, session: TeacherSession, offset: int, token_ids: np.typing.NDArray[np.int32]
    ) -> None:
        seen, loop = self._seen, asyncio.get_running_loop()
        sent = loop.time()
        seen.rows_asked += len(token_ids)
        seen.rows_under_way += len(token_ids)
        try:
            scores = await session.append(TokenSpan(offset=offset, token_ids=token_ids))
        except asyncio.CancelledError:
            seen.given_up_rows += len(token_ids)
            raise
        except TeacherError:
            if not self._killed:
                raise
            seen.given_up_rows += len(token_ids)
            raise asyncio.CancelledError from None
        finally:
            seen.rows_under_way -= len(token_ids)
        seen.append_s += loop.time() - sent
        seen.appends += 1
        if scores.rows.offset == offset:
            seen.rows_received += len(scores.rows)


async def connected(addresses: Sequence[str], name: str) -> TeacherClient:
    """A client of its own, as each trainer has."""
    return await TeacherClient.connect(
        list(addresses), tokenizer_fingerprint="", vocab_size=0, run_id=name
    )
