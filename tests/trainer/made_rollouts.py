"""Rollouts made by hand or at random for tests of what comes after generation."""

from __future__ import annotations

import numpy as np

from student_trainer.records import Finish, Prompt, Rollout, RolloutTimes
from teacher_wire.records import DriftState, ScoreRows
from tests.trainer.learner.tiny_student import VOCAB_SIZE


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def random_rollout(
    rng: np.random.Generator,
    *,
    num_prompt: int = 3,
    num_response: int = 5,
    k: int = 4,
    j: int = 3,
    masked: int = 0,
    has_candidates: bool = True,
) -> Rollout:
    """Two random policies over the tiny student's vocabulary and a response of one of them."""
    shape = (num_response, VOCAB_SIZE)
    behavior, teacher = (log_softmax(2 * rng.standard_normal(shape)) for _ in range(2))
    response = rng.integers(2, VOCAB_SIZE, num_response).astype(np.int32)
    rows = np.arange(num_response)
    behavior_top = np.argsort(-behavior)[:, :j].astype(np.int32)
    teacher_top = np.argsort(-teacher)[:, :k].astype(np.int32)

    def at(logprobs: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)

    mask = np.ones(num_response, np.bool_)
    mask[:masked] = False
    return Rollout(
        prompt=Prompt(
            prompt_id=str(num_prompt),
            text="",
            token_ids=rng.integers(2, VOCAB_SIZE, num_prompt).astype(np.int32),
            answer=None,
        ),
        response_ids=response,
        behavior_logprobs=behavior[rows, response].astype(np.float32),
        student_topk_ids=behavior_top,
        student_topk_logprobs=at(behavior, behavior_top),
        mask=mask,
        teacher=ScoreRows(
            offset=0,
            topk_ids=teacher_top,
            topk_logprobs=at(teacher, teacher_top),
            token_logprobs=teacher[rows, response].astype(np.float32),
            candidate_logprobs=at(teacher, behavior_top) if has_candidates else None,
            bad_events=rng.random(num_response) < 0.3,
            entropies=-(np.exp(teacher) * teacher).sum(-1).astype(np.float32),
        ),
        drift=None,
        finish=Finish.STOP,
        num_generated=num_response,
        policy_version=0,
        times=RolloutTimes(
            started_s=0.0, generated_s=1.0, scored_s=1.0, round_trip_tokens=0, verdict_span_tokens=0
        ),
    )


def plain_rollout(
    *,
    overlap_counts: list[int],
    bad_events: list[int] | None = None,
    mask: list[int] | None = None,
    finish: Finish = Finish.STOP,
    num_generated: int | None = None,
    exhausted_at: int | None = None,
    policy_version: int = 0,
    times: RolloutTimes | None = None,
) -> Rollout:
    """One kept token for each overlap count; what is not named is of no account."""
    length = len(overlap_counts)
    zeros = np.zeros(length, np.float32)
    return Rollout(
        prompt=Prompt(prompt_id="p", text="", token_ids=np.array([5], np.int32), answer=None),
        response_ids=np.zeros(length, np.int32),
        behavior_logprobs=zeros,
        student_topk_ids=np.zeros((length, 4), np.int32),
        student_topk_logprobs=np.zeros((length, 4), np.float32),
        mask=np.array(mask if mask is not None else [1] * length, np.bool_),
        teacher=ScoreRows(
            offset=0,
            topk_ids=np.zeros((length, 4), np.int32),
            topk_logprobs=np.zeros((length, 4), np.float32),
            token_logprobs=zeros,
            overlap_counts=np.array(overlap_counts, np.uint8),
            bad_events=None if bad_events is None else np.array(bad_events, np.bool_),
        ),
        drift=DriftState(num_tokens=length, exhausted_at=exhausted_at),
        finish=finish,
        num_generated=length if num_generated is None else num_generated,
        policy_version=policy_version,
        times=times
        or RolloutTimes(
            started_s=0.0, generated_s=1.0, scored_s=1.0, round_trip_tokens=0, verdict_span_tokens=0
        ),
    )
