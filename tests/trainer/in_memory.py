"""A sampler and a teacher that live in memory: real implementations of the protocols, no model.

Every pause is a number of turns of the event loop, so that what happens is the same on every
machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from student_trainer.records import Delta, Finish, Prompt, SamplingOptions
from student_trainer.rollouts.rollout import RolloutRules
from student_trainer.rollouts.samplers.base import Weights
from student_trainer.special_tokens import SpecialTokens
from teacher_wire.records import DriftState, ScoreRows, Scores, Timing, TokenSpan, Verdict

VOCAB_SIZE = 50
EOS_ID = 1
TEACHER_K = 3


async def turns(count: int) -> None:
    """Lets everything else run `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)


class InMemorySampler:
    """Draws tokens from a generator seeded by weights, request seed and prompt."""

    def __init__(
        self,
        *,
        tokens_per_delta: int = 1,
        stop_after: int | None = None,
        abort_lag_tokens: int = 0,
        weights: int = 0,
        fail_seed: int | None = None,
    ) -> None:
        self.tokens_per_delta = tokens_per_delta
        self.stop_after = stop_after
        self.abort_lag_tokens = abort_lag_tokens
        self.weights = weights
        self.fail_seed = fail_seed
        self.aborts: list[str] = []
        self.seeds: dict[str, int | None] = {}
        self.running: dict[str, int] = {}
        """Tokens handed out so far by generations that have not ended."""
        self.ended: dict[str, int] = {}

    async def start(self) -> None:
        """Nothing to load."""

    def draw(
        self, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Token ids [n], top-k ids [n, J] and log-probs [n] of a whole response."""
        rng = np.random.default_rng((self.weights, options.seed or 0, *prompt_ids.tolist()))
        ids = rng.integers(2, VOCAB_SIZE, options.max_tokens).astype(np.int32)
        if self.stop_after is not None and self.stop_after <= options.max_tokens:
            ids = ids[: self.stop_after]
            ids[-1] = EOS_ID
        topk = rng.integers(2, VOCAB_SIZE, (len(ids), options.num_topk)).astype(np.int32)
        return ids, topk, rng.uniform(-5, -0.1, len(ids)).astype(np.float32)

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        self.seeds[request_id] = options.seed
        ids, topk, logprobs = self.draw(prompt_ids, options)
        self.running[request_id] = 0
        stop_at = len(ids)
        try:
            while (start := self.running[request_id]) < stop_at:
                await asyncio.sleep(0)
                if request_id in self.aborts:
                    stop_at = min(stop_at, start + self.abort_lag_tokens)
                if options.seed is not None and options.seed == self.fail_seed:
                    raise ConnectionResetError("the sampler died")
                end = min(start + self.tokens_per_delta, stop_at)
                finish = None
                if end == len(ids):
                    finish = Finish.STOP if ids[-1] == EOS_ID else Finish.LENGTH
                elif end == stop_at:
                    finish = Finish.TRUNCATED
                self.running[request_id] = end
                yield Delta(
                    token_ids=ids[start:end],
                    logprobs=logprobs[start:end],
                    topk_ids=topk[start:end],
                    topk_logprobs=np.repeat(logprobs[start:end, None], topk.shape[1], axis=1),
                    finish=finish,
                )
        finally:
            self.ended[request_id] = self.running.pop(request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        self.aborts += request_ids

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        """They pass through nothing."""

    async def sleep(self) -> None:
        """It does not."""

    async def load_weights(self, weights: Weights) -> None:
        ((_, tensor),) = weights
        self.weights = int(tensor)

    async def close(self) -> None:
        """Nothing to free."""


def teacher_rows(span: TokenSpan) -> ScoreRows:
    """Rows that are a function of the token and its position alone, whatever the spans."""
    ids = span.token_ids
    positions = np.arange(span.offset, span.offset + len(ids))
    topk_ids = (ids[:, None] + np.arange(TEACHER_K, dtype=np.int32)) % VOCAB_SIZE
    scale = 1.0 + positions.astype(np.float32) / 100
    return ScoreRows(
        offset=span.offset,
        topk_ids=topk_ids.astype(np.int32),
        topk_logprobs=-scale[:, None] * np.arange(1, 1 + TEACHER_K, dtype=np.float32),
        token_logprobs=(-scale * (1 + ids % 3)).astype(np.float32),
        candidate_logprobs=None
        if span.candidate_ids is None
        else -scale[:, None] * (1 + span.candidate_ids % 5).astype(np.float32),
        overlap_counts=None if span.candidate_ids is None else (ids % 3).astype(np.uint8),
        bad_events=positions % 2 == 1,
    )


class ScriptedSession:
    """A teacher session that follows a script and remembers what it was sent."""

    def __init__(
        self,
        *,
        turns_per_append: int = 0,
        truncate_at: int | None = None,
        failures: dict[int, Exception] | None = None,
    ) -> None:
        self.spans: list[TokenSpan] = []
        self.num_closed = 0
        self.num_under_way = 0
        self._turns_per_append = turns_per_append
        self._truncate_at = truncate_at
        self._failures = failures or {}
        """By number of the append."""

    async def append(self, span: TokenSpan) -> Scores:
        self.spans.append(span)
        self.num_under_way += 1
        assert self.num_under_way == 1, "one append at a time"
        try:
            await turns(self._turns_per_append)
        finally:
            self.num_under_way -= 1
        if (error := self._failures.get(len(self.spans) - 1)) is not None:
            raise error
        upto = span.offset + len(span)
        truncate = self._truncate_at is not None and self._truncate_at <= upto
        return Scores(
            rows=teacher_rows(span),
            drift=DriftState(
                num_tokens=upto,
                num_bad_events=upto // 2,
                exhausted_at=self._truncate_at if truncate else None,
            ),
            verdict=Verdict.TRUNCATE if truncate else Verdict.CONTINUE,
            keep_tokens=self._truncate_at if truncate else None,
            timing=Timing(),
        )

    async def close(self) -> None:
        assert self.num_under_way == 0, "closed while an append is under way"
        self.num_closed += 1


def prompt(*token_ids: int, answer: str | None = None) -> Prompt:
    """A problem of these tokens."""
    return Prompt(
        prompt_id="-".join(map(str, token_ids)),
        text="",
        token_ids=np.array(token_ids, np.int32),
        answer=answer,
    )


def rules(
    *,
    chunk_tokens: int = 4,
    specials: Sequence[int] = (),
    finish_when_absent: bool = False,
    max_span_tokens: int = 1000,
    block_tokens: int = 1,
) -> RolloutRules:
    """Rules of a run, plain unless told."""
    return RolloutRules(
        chunk_tokens=chunk_tokens,
        max_span_tokens=max_span_tokens,
        block_tokens=block_tokens,
        specials=SpecialTokens(specials, first_only=True),
        finish_when_absent=finish_when_absent,
    )
