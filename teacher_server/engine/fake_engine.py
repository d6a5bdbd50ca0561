"""A deterministic engine without a model: for tests of the transport and for client development.

Every row is a pure function of the tokens before it, so chunked, rewound and repeated queries must
give equal rows to the bit. Speed is settable, and faults can be injected.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from teacher_server.engine.base import EngineInfo, EngineRows, ScoreQuery
from teacher_server.engine.extras import DEFINITIONS, Distribution
from teacher_wire.errors import EngineError, NonFiniteError
from teacher_wire.id_ranges import IdRanges, fill
from teacher_wire.records import MODEL_COLUMNS, ModelRows

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LOGIT_RANGE = 12.0
_ROW_BLOCK = 64
"""Rows computed at a time, which bounds the memory of a query."""
_REMEMBERED = 100


class Fault(Enum):
    """What goes wrong with one query."""

    RAISE = "raise"
    """An EngineError."""
    CRASH = "crash"
    """An exception the engine's author did not expect."""
    HANG = "hang"
    """No answer until cancelled."""
    NAN = "nan"
    """A NaN that the engine notices."""
    OOM = "oom"
    """Memory runs out; with steps, for every query of the step."""
    LEAK_NAN = "leak_nan"
    """A NaN that the engine does not notice."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A query that waits for its step."""

    num_rows: int
    out_of_memory: bool
    done: asyncio.Future[None]


class FakeEngine:
    """Hash-seeded rows over a small vocabulary."""

    def __init__(
        self,
        *,
        vocab_size: int = 512,
        max_context: int = 8192,
        max_k: int = 128,
        prefill_tokens_per_s: float = 0.0,
        base_latency_s: float = 0.0,
        step_tokens: int = 0,
    ) -> None:
        """A query takes base_latency_s plus its new tokens at prefill_tokens_per_s (0: no time).

        With step_tokens it is not the queries that take this time, but steps, one after the other,
        each of as many queries as have step_tokens together, in order of arrival, or of one larger.
        """
        self._info = EngineInfo(
            name="fake",
            version="1",
            dtype="float32",
            vocab_size=vocab_size,
            max_context=max_context,
            max_k=max_k,
        )
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._base_latency_s = base_latency_s
        self._step_tokens = step_tokens
        self._line: deque[_Waiting] = deque()
        self._stepper: asyncio.Task[None] | None = None
        self.num_steps = 0
        self._faults: deque[Fault] = deque()
        self.alive = True
        self.num_queries = 0
        self.num_rows = 0
        self.forgotten: deque[str] = deque(maxlen=_REMEMBERED)
        """The last sessions that were forgotten: a server may run for days on this engine."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    def inject(self, fault: Fault, *, times: int = 1) -> None:
        """The next `times` queries meet this fault."""
        self._faults.extend([fault] * times)

    async def start(self) -> None:
        """Nothing to load."""

    async def score(self, query: ScoreQuery) -> EngineRows:
        num_rows = len(query.token_ids) - query.first_row
        self.num_queries += 1
        self.num_rows += num_rows
        fault = self._faults.popleft() if self._faults else None
        if self._step_tokens:
            await self._in_a_step(num_rows, fault)
        else:
            await self._spend_time(num_rows)
            if fault is Fault.OOM:
                raise MemoryError("injected fault")
        if fault is Fault.RAISE:
            raise EngineError("injected fault")
        if fault is Fault.CRASH:
            raise RuntimeError("injected crash")
        if fault is Fault.HANG:
            await asyncio.Event().wait()
        if fault is Fault.NAN:
            raise NonFiniteError("injected NaN")
        rows = score_rows(query, self._info.vocab_size)
        if fault is Fault.LEAK_NAN:
            rows.token_logprobs[-1] = np.nan
        return rows

    async def _spend_time(self, num_rows: int) -> None:
        seconds = self._base_latency_s
        if self._prefill_tokens_per_s:
            seconds += num_rows / self._prefill_tokens_per_s
        if seconds:
            await asyncio.sleep(seconds)

    async def _in_a_step(self, num_rows: int, fault: Fault | None) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(_Waiting(num_rows, fault is Fault.OOM, done))
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.create_task(self._run_steps())
        await done

    async def _run_steps(self) -> None:
        while self._line:
            step = [self._line.popleft()]
            num_rows = step[0].num_rows
            while self._line and num_rows + self._line[0].num_rows <= self._step_tokens:
                step.append(self._line.popleft())
                num_rows += step[-1].num_rows
            self.num_steps += 1
            await self._spend_time(num_rows)
            for query in step:
                if query.done.done():  # its caller has gone
                    continue
                if any(other.out_of_memory for other in step):
                    query.done.set_exception(MemoryError("injected fault"))
                else:
                    query.done.set_result(None)

    def forget(self, session: str) -> None:
        self.forgotten.append(session)

    async def healthy(self) -> bool:
        return self.alive

    def kv_used_ratio(self) -> float | None:
        """It keeps nothing."""
        return None

    def kv_capacity_tokens(self) -> int | None:
        """It has no cache."""
        return None

    async def close(self) -> None:
        self.alive = False
        if self._stepper is not None:
            self._stepper.cancel()


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, element by element."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def prefix_seeds(token_ids: NDArray[np.int32]) -> NDArray[np.uint64]:
    """[L] entry t is a hash of token_ids[:t] in their order; entry 0 that of nothing."""
    positions = np.arange(1, len(token_ids) + 1, dtype=np.uint64) * _GOLDEN
    terms = _mix(token_ids.astype(np.uint64) * _MIX_2 + positions)
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)[:-1]])


def full_logprobs(
    seeds: NDArray[np.uint64], vocab_size: int, temperature: float, excluded: IdRanges = ()
) -> NDArray[np.float64]:
    """[n, V] log-probs over the vocabulary less what is excluded."""
    ids = np.arange(vocab_size, dtype=np.uint64) * _GOLDEN
    uniform = _mix(_mix(seeds)[:, None] + ids) / np.float64(2**64)
    logits = _LOGIT_RANGE * uniform / temperature
    fill(logits, excluded, -np.inf)
    peak = logits.max(axis=1, keepdims=True)
    logprobs: NDArray[np.float64] = logits - peak
    logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
    return logprobs


def score_rows(query: ScoreQuery, vocab_size: int) -> EngineRows:
    """The rows that FakeEngine gives for a query."""
    seeds = prefix_seeds(query.token_ids)[query.first_row :]
    targets = query.token_ids[query.first_row :]
    blocks = []
    for start in range(0, len(seeds), _ROW_BLOCK):
        rows = slice(start, start + _ROW_BLOCK)
        logprobs = full_logprobs(seeds[rows], vocab_size, query.temperature, query.excluded_ids)
        candidates = None if query.candidate_ids is None else query.candidate_ids[rows]
        blocks.append(_block(logprobs, targets[rows], candidates, query))
    return EngineRows(computed_tokens=len(seeds), **MODEL_COLUMNS.joined(blocks))


def _block(
    logprobs: NDArray[np.float64],
    targets: NDArray[np.int32],
    candidates: NDArray[np.int32] | None,
    query: ScoreQuery,
) -> ModelRows:
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, : query.k]
    target = np.take_along_axis(logprobs, targets[:, None], axis=1)
    columns = {
        "topk_ids": order,
        "topk_logprobs": np.take_along_axis(logprobs, order, axis=1),
        "token_logprobs": target[:, 0],
    }
    if candidates is not None:
        columns["candidate_logprobs"] = np.take_along_axis(logprobs, candidates, axis=1)
    if query.extras:
        whole = Distribution(logprobs, logprobs, np.exp(logprobs), target)
        columns |= {name: DEFINITIONS[name](whole) for name in query.extras}
    return ModelRows(**MODEL_COLUMNS.typed(columns))


def fake_fingerprint(vocab_size: int) -> str:
    """What a fake engine without a tokenizer tells as its tokenizer fingerprint."""
    return hashlib.sha256(f"fake-{vocab_size}".encode()).hexdigest()
