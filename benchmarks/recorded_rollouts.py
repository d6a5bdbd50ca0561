"""Made-up recorded rollouts of any length, for tests and benchmarks of what reads them.

The student drifts: the share of its top-k that the teacher has falls along the response. Numbers
are those of the rules (`teacher_wire.drift`), so a reader that computes them anew must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_records import writing
from rollout_records.schema import FOLDER, Origin
from teacher_wire.drift import advance, reliability
from teacher_wire.drift_metrics import OverlapRatio, overlap_counts
from teacher_wire.records import DriftPolicy, DriftState

POLICY = DriftPolicy(metric=OverlapRatio(k=8, threshold=0.5), w_drop=0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeUp:
    """What rollouts are made of."""

    vocab_size: int = 512
    k: int = 8
    special_ids: tuple[int, ...] = (0,)
    words: tuple[int, ...] = ()
    """Ids that a response repeats; empty: any."""


def rollout(made: MadeUp, *, step: int, index: int, num_tokens: int, seed: int) -> dict[str, Any]:
    """The cells of one row, by column."""
    rng = np.random.default_rng([seed, step, index])
    topk = _distinct(rng, num_tokens, made)
    topk_logprobs = _falling(rng, num_tokens, made.k)
    student, student_logprobs = _student(rng, topk, made), _falling(rng, num_tokens, made.k)
    ids = np.where(rng.random(num_tokens) < 0.7, topk[:, 0], student[:, -1]).astype(np.int32)
    if made.words:
        ids = np.resize(np.array(made.words, np.int32), num_tokens)
    mask = ~np.isin(ids, made.special_ids)
    counts = overlap_counts(student[:, : POLICY.metric.k], topk[:, : POLICY.metric.k])
    bad = POLICY.metric.bad_events(ids, _Rows(), counts) & mask
    state, verdict, _ = advance(POLICY, DriftState(), bad)
    overlap = counts / min(POLICY.metric.k, made.k)
    teacher = -rng.exponential(0.8, num_tokens)
    kl = rng.exponential(0.3, num_tokens)
    return {
        "step": step,
        "index": index,
        "prompt_id": f"/data/train.jsonl:{index}",
        "prompt": "What is <b>2 + 2</b>?",
        "answer": "4",
        "teacher": None,
        "response": f"response {index} of step {step} <img src=x onerror=alert(1)>",
        "finish": "truncated" if verdict.value == "truncate" else "stop",
        "verdict": verdict.value,
        "num_tokens": num_tokens,
        "num_generated": num_tokens,
        "num_bad_events": state.num_bad_events,
        "exhausted_at": state.exhausted_at,
        "policy_version": step - 1,
        "correct": bool(index % 2),
        "mean_overlap": float(overlap.mean()),
        "mean_teacher_logprob": float(teacher.mean()),
        "mean_reverse_kl": float(kl.mean()),
        "started_at": 1_780_000_000_000 + 1000 * step,
        "generate_s": 1.5,
        "score_wait_s": 0.1,
        "round_trip_tokens": 0,
        "verdict_span_tokens": 0,
        "prompt_ids": rng.integers(1, made.vocab_size, 12),
        "response_ids": ids,
        "mask": mask,
        "sampled": None,
        "behavior_logprobs": -rng.exponential(0.7, num_tokens),
        "teacher_logprobs": teacher,
        "reverse_kl": kl,
        "overlap": overlap,
        "bad_events": bad,
        "reliability": reliability(POLICY.w_drop, bad),
        "weight": reliability(POLICY.w_drop, bad) * mask,
        "entropies": rng.exponential(1.0, num_tokens),
        "ranks": rng.integers(1, 50, num_tokens),
        "teacher_topk_ids": topk,
        "teacher_topk_logprobs": topk_logprobs,
        "student_topk_ids": student,
        "student_topk_logprobs": student_logprobs,
        "teacher_logprobs_at_student_topk": _falling(rng, num_tokens, made.k),
    }


class _Rows:
    """An overlap metric looks at no row."""

    topk_ids = np.empty((0, 0), np.int32)
    topk_logprobs = np.empty((0, 0), np.float32)
    candidate_logprobs = None


def _distinct(rng: np.random.Generator, n: int, made: MadeUp) -> NDArray[np.int32]:
    """[n, k] ids, none twice in a row: an arithmetic progression modulo the vocabulary."""
    first, stride = rng.integers(0, made.vocab_size, (2, n, 1))
    stride = 1 + stride % (made.vocab_size // made.k - 1)
    ids = (first + stride * np.arange(made.k)) % made.vocab_size
    return ids.astype(np.int32)


def _student(rng: np.random.Generator, topk: NDArray[np.int32], made: MadeUp) -> NDArray[np.int32]:
    """[n, k] the teacher's, some replaced by ids outside; more and more along the response."""
    share = np.linspace(0.15, 0.75, len(topk))[:, None]
    others = np.arange(made.k, dtype=np.int32) % made.vocab_size
    mixed = np.where(rng.random(topk.shape) < share, others, topk)
    return rng.permuted(mixed, axis=1)


def _falling(rng: np.random.Generator, n: int, k: int) -> NDArray[np.float64]:
    """[n, k] log-probs, the largest first."""
    mass = np.sort(rng.exponential(1.0, (n, k)) ** 3 + 1e-4, axis=1)[:, ::-1]
    return np.log(0.97 * mass / mass.sum(axis=1, keepdims=True))


def write_step(
    run: Path,
    step: int,
    rows: Sequence[dict[str, Any]],
    *,
    rank: int = 0,
    fingerprint: str | None = None,
) -> Path:
    """One file of a run, as a trainer leaves it."""
    metric = POLICY.metric
    origin = Origin(
        tokenizer="/models/student",
        tokenizer_fingerprint=fingerprint,
        student="/models/student",
        teachers={"": "/models/teacher-large"},
        drift_policy={
            "metric": metric.name,
            **asdict(metric),
            "w_drop": POLICY.w_drop,
            "stop_in_flight": POLICY.stop_in_flight,
        },
        commit="0123456789abcdef",
        temperature=1.0,
        run=run.name,
    )
    return writing.write_step(run / FOLDER, step, rank, rows, origin)
