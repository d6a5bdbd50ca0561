"""Rows of recorded rollouts as tests need them, in the form in which they are read back."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollout_records.measures import reliability_of, reverse_kl, with_means
from teacher_wire.records import DriftPolicy

POLICY = DriftPolicy(w_drop=0.25)


def made_row(
    index: int = 0,
    *,
    step: int = 1,
    tokens: int = 12,
    k: int = 4,
    vocab: int = 1000,
    with_candidates: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """One rollout, at random by its step and index."""
    rng = np.random.default_rng((step, index))
    teacher, student = (_top_k(rng, tokens, k, vocab) for _ in range(2))
    at_student = np.sort(-rng.exponential(2.0, (tokens, k)).astype(np.float32), axis=1)[:, ::-1]
    bad = rng.random(tokens) < 0.2
    row: dict[str, Any] = {
        "step": step,
        "index": index,
        "prompt_id": f"problem-{index}",
        "prompt": "1+1=",
        "answer": "2",
        "teacher": None,
        "response": "2" * tokens,
        "finish": "stop",
        "verdict": "continue",
        "num_tokens": tokens,
        "num_generated": tokens + 1,
        "num_bad_events": int(bad.sum()),
        "exhausted_at": None,
        "policy_version": step - 1,
        "correct": True,
        "started_at": 1_700_000_000_000 + index,
        "generate_s": 1.5,
        "score_wait_s": 0.25,
        "round_trip_tokens": 0,
        "verdict_span_tokens": 0,
        "prompt_ids": rng.integers(0, vocab, 5).astype(np.int32),
        "response_ids": rng.integers(0, vocab, tokens).astype(np.int32),
        "mask": np.arange(tokens) != 1,
        "sampled": None,
        "behavior_logprobs": -rng.exponential(1.0, tokens).astype(np.float32),
        "teacher_logprobs": -rng.exponential(1.5, tokens).astype(np.float32),
        "bad_events": bad,
        "reliability": reliability_of(POLICY, bad),
        "weight": np.where(np.arange(tokens) != 1, 1.5, 0.0).astype(np.float32),
        "entropies": None,
        "ranks": rng.integers(1, 9, tokens).astype(np.int32),
        "teacher_topk_ids": teacher[0],
        "teacher_topk_logprobs": teacher[1],
    }
    if with_candidates:
        row |= {
            "student_topk_ids": student[0],
            "student_topk_logprobs": student[1],
            "teacher_logprobs_at_student_topk": at_student,
            "reverse_kl": reverse_kl(student[1], at_student),
            "overlap": rng.integers(0, k + 1, tokens) / k,
        }
    return with_means(row | changes)


def _top_k(
    rng: np.random.Generator, tokens: int, k: int, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    ids = rng.integers(0, vocab, (tokens, k)).astype(np.int32)
    shares = np.sort(rng.dirichlet(np.ones(k + 1), tokens)[:, :k], axis=1)[:, ::-1]
    return ids, np.log(shares).astype(np.float32)
