"""One rollout: generate, stream to the teacher as it grows, obey. Knows neither vllm nor grpc.

Two tasks share a GrowingResponse: one takes tokens from the sampler, the other sends what has
gathered to the teacher, one append at a time. Tokens that arrive while an append is under way go
with the next one, so a slow teacher gets larger appends, not a queue. What others say between the
student's answers goes to the teacher with them and counts nowhere.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from student_trainer.records import Finish, Prompt, Rollout, RolloutTimes, SamplingOptions
from student_trainer.rollouts.generation import Generation, GrowingResponse
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.special_tokens import SpecialTokens
from teacher_wire.errors import NotReadyError
from teacher_wire.records import (
    DriftState,
    ScoreRows,
    Scores,
    TokenSpan,
    Verdict,
    concat_rows,
    slice_rows,
)


class TeacherSession(Protocol):
    """One response at the teacher."""

    async def append(self, span: TokenSpan) -> Scores:
        """Scores of the next tokens. Raises NotReadyError when the teacher stays away."""

    async def close(self) -> None:
        """Ends the session."""


@dataclass(slots=True)
class Judgement:
    """What the teacher has said of a response so far."""

    parts: list[ScoreRows] = field(default_factory=list)
    num_scored: int = 0
    drift: DriftState | None = None
    keep_tokens: int | None = None
    """Set by a TRUNCATE verdict."""
    absent: bool = False
    """The teacher stayed away and the rest is not scored."""
    round_trip_tokens: int = 0
    verdict_span_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRules:
    """What all rollouts of one teacher share."""

    chunk_tokens: int
    """Tokens gathered before an append, unless generation ends."""
    max_span_tokens: int
    """The most tokens that the teacher takes in one append."""
    block_tokens: int
    """An append ends where prompt plus response is a multiple of this, where it can."""
    specials: SpecialTokens
    finish_when_absent: bool
    loss_weight: float = 1.0
    """What their tokens count in the loss."""


async def run_rollout(
    prompt: Prompt,
    *,
    request_id: str,
    options: SamplingOptions,
    sampler: Sampler,
    session: TeacherSession,
    rules: RolloutRules,
    policy_version: int,
) -> Rollout | None:
    """Generates one response while the teacher scores it; None when nothing of it was scored.

    Raises TeacherError when the teacher fails.
    """
    started_s, started_at = time.monotonic(), time.time()
    generation = Generation(prompt, request_id=request_id, options=options, sampler=sampler)
    judge = asyncio.create_task(_judge(generation, session, rules))
    try:
        await generation.run()
        generated_s = time.monotonic()
        judgement = await judge
        scored_s = time.monotonic()
    finally:
        # The append under way ends before its session does.
        judge.cancel()
        await asyncio.wait([judge])
        await session.close()
    times = RolloutTimes(
        started_s=started_s,
        generated_s=generated_s,
        scored_s=scored_s,
        round_trip_tokens=judgement.round_trip_tokens,
        verdict_span_tokens=judgement.verdict_span_tokens,
        started_at=started_at,
    )
    if not judgement.parts:
        return None
    return _rollout(prompt, generation.growing, judgement, rules, policy_version, times)


async def _judge(generation: Generation, session: TeacherSession, rules: RolloutRules) -> Judgement:
    """Sends tokens as they come until generation ends or the teacher's word does.

    In the second case, a failure included, it stops the generation.
    """
    try:
        judgement = await _judgement(generation.growing, session, rules)
    except Exception:
        await generation.stop()
        raise
    if generation.growing.finish is None:
        await generation.stop()
    return judgement


async def _judgement(
    growing: GrowingResponse, session: TeacherSession, rules: RolloutRules
) -> Judgement:
    judgement = Judgement()
    while True:
        there = await growing.wait_for(judgement.num_scored + rules.chunk_tokens)
        if there == judgement.num_scored:
            return judgement
        upto = min(there, judgement.num_scored + rules.max_span_tokens)
        if upto < there or growing.finish is None:
            block_end = upto - (growing.num_prompt + upto) % rules.block_tokens
            upto = block_end if block_end > judgement.num_scored else upto
        span = _span(growing, judgement.num_scored, upto, rules.specials)
        try:
            scores = await session.append(span)
        except NotReadyError:
            if not rules.finish_when_absent:
                raise
            judgement.absent = True
            return judgement
        judgement.parts.append(scores.rows)
        judgement.num_scored = upto
        judgement.drift = scores.drift
        if scores.verdict is Verdict.TRUNCATE:
            judgement.keep_tokens = scores.keep_tokens
            judgement.round_trip_tokens = int(growing.sampled[upto : growing.num_tokens].sum())
            judgement.verdict_span_tokens = len(span)
            return judgement


def _span(growing: GrowingResponse, start: int, end: int, specials: SpecialTokens) -> TokenSpan:
    has_candidates = growing.topk_ids.shape[1] > 0
    return TokenSpan(
        offset=start,
        token_ids=growing.token_ids[start:end],
        candidate_ids=growing.topk_ids[start:end] if has_candidates else None,
        event_mask=growing.counted(specials, end)[start:],
    )


def _rollout(
    prompt: Prompt,
    growing: GrowingResponse,
    judgement: Judgement,
    rules: RolloutRules,
    policy_version: int,
    times: RolloutTimes,
) -> Rollout:
    """Drops everything past the point where the teacher's word ends."""
    kept = judgement.num_scored
    finish = growing.finish or Finish.LENGTH
    if judgement.keep_tokens is not None:
        kept, finish = judgement.keep_tokens, Finish.TRUNCATED
    elif judgement.absent:
        finish = Finish.UNSCORED
    sampled = growing.sampled[:kept]
    return Rollout(
        prompt=prompt,
        response_ids=growing.token_ids[:kept].copy(),
        behavior_logprobs=growing.logprobs[:kept].copy(),
        student_topk_ids=growing.topk_ids[:kept].copy(),
        student_topk_logprobs=growing.topk_logprobs[:kept].copy(),
        mask=growing.counted(rules.specials, kept),
        teacher=slice_rows(concat_rows(judgement.parts), 0, kept),
        drift=judgement.drift,
        finish=finish,
        num_generated=growing.num_sampled,
        policy_version=policy_version,
        times=times,
        loss_weight=rules.loss_weight,
        sampled=None if sampled.all() else sampled.copy(),
    )
