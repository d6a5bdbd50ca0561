"""A rollout as a row of the recording, and which of a step's rollouts are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_records.measures import overlap_depth, reliability_of, reverse_kl, with_means
from student_trainer.records import Finish, Rollout
from teacher_wire.records import DriftPolicy, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMaker:
    """What of a row is not in the rollout."""

    decode: Callable[[NDArray[np.int32]], str]
    """Token ids to text, special tokens included."""
    is_right: Callable[[Rollout], bool | None]
    """Whether its answer is; None where nobody can say."""
    policies: Mapping[str | None, DriftPolicy]
    """The drift policy of each teacher."""

    def row(
        self, rollout: Rollout, *, step: int, index: int, weight: NDArray[np.float32] | None
    ) -> dict[str, Any]:
        """Column -> value. `weight`: [T] what multiplied the loss of each token."""
        prompt, teacher, times = rollout.prompt, rollout.teacher, rollout.times
        policy = self.policies.get(prompt.teacher)
        state = rollout.drift
        verdict = Verdict.TRUNCATE if rollout.finish is Finish.TRUNCATED else Verdict.CONTINUE
        return with_means(
            {
                "step": step,
                "index": index,
                "prompt_id": prompt.prompt_id,
                "prompt": prompt.text,
                "answer": prompt.answer,
                "teacher": prompt.teacher,
                "response": self.decode(rollout.response_ids),
                "finish": rollout.finish.value,
                "verdict": verdict.value,
                "num_tokens": len(rollout),
                "num_generated": rollout.num_generated,
                "num_bad_events": None
                if teacher.bad_events is None
                else int(np.count_nonzero(teacher.bad_events)),
                "exhausted_at": None if state is None else state.exhausted_at,
                "policy_version": rollout.policy_version,
                "correct": self.is_right(rollout),
                "started_at": None if times.started_at is None else int(1000 * times.started_at),
                "generate_s": times.generated_s - times.started_s,
                "score_wait_s": max(0.0, times.scored_s - times.generated_s),
                "round_trip_tokens": times.round_trip_tokens,
                "verdict_span_tokens": times.verdict_span_tokens,
                "prompt_ids": prompt.token_ids,
                "response_ids": rollout.response_ids,
                "mask": rollout.mask,
                "sampled": rollout.sampled,
                "behavior_logprobs": rollout.behavior_logprobs,
                "teacher_logprobs": teacher.token_logprobs,
                "bad_events": teacher.bad_events,
                "reliability": reliability_of(policy, teacher.bad_events),
                "weight": weight,
                "entropies": teacher.entropies,
                "ranks": teacher.token_ranks,
                "teacher_topk_ids": teacher.topk_ids,
                "teacher_topk_logprobs": teacher.topk_logprobs,
                **_compared(rollout, policy),
            }
        )


def _compared(rollout: Rollout, policy: DriftPolicy | None) -> dict[str, Any]:
    """What is there where the student's own top-k was sent to the teacher."""
    teacher = rollout.teacher
    ids, logprobs = rollout.student_topk_ids, rollout.student_topk_logprobs
    num_candidates = ids.shape[1]
    if num_candidates == 0 or teacher.candidate_logprobs is None:
        return {}
    depth = overlap_depth(teacher.topk_ids.shape[1], num_candidates, policy)
    return {
        "student_topk_ids": ids,
        "student_topk_logprobs": logprobs,
        "teacher_logprobs_at_student_topk": teacher.candidate_logprobs,
        "reverse_kl": reverse_kl(logprobs, teacher.candidate_logprobs),
        "overlap": None if teacher.overlap_counts is None else teacher.overlap_counts / depth,
    }


def chosen(rollouts: Sequence[Rollout], count: int | None) -> dict[int, Rollout]:
    """`count` of a step's rollouts by their index, all for None: evenly spaced over the step.

    Where some were stopped in flight and none of these was, the nearest to the first that was gives
    its place to it.
    """
    total = len(rollouts)
    if count is None or count >= total:
        return dict(enumerate(rollouts))
    if count == 0:
        return {}
    indices = [int((i + 0.5) * total / count) for i in range(count)]
    stopped = [i for i, r in enumerate(rollouts) if r.finish is Finish.TRUNCATED]
    if stopped and not set(stopped) & set(indices):
        nearest = min(range(count), key=lambda place: abs(indices[place] - stopped[0]))
        indices[nearest] = stopped[0]
    return {index: rollouts[index] for index in sorted(indices)}
