"""Tokens that the student is sure of and the teacher all but excludes, in many rollouts at once.

Revisiting OPD (2603.25562) saw `<` at -0.07 nats of the student and -19 of the teacher, and
`<|im_end|>` at -0.00 and -58, between two models of one family: spellings of the chat template, not
mistakes, whose gradient drowns everything else. They belong under `special_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from student_trainer.diagnostics.step_report import MismatchedToken
from student_trainer.records import Rollout

TEACHER_FLOOR_NATS = -15.0
"""A teacher below this all but excludes the token (3e-7)."""
STUDENT_SURE_NATS = -0.5
"""A student whose mean is above this is sure of it; below, it is ordinary disagreement."""
MIN_ROLLOUT_SHARE = 0.1
MIN_ROLLOUTS = 2
"""One rollout is never many, however small the step."""


def mismatched_tokens(rollouts: Sequence[Rollout]) -> list[MismatchedToken]:
    """Mismatched ids, the most frequent first. Masked positions are already dealt with."""
    ids, owners, teacher, behavior = [], [], [], []
    for number, rollout in enumerate(rollouts):
        low = rollout.mask & (rollout.teacher.token_logprobs < TEACHER_FLOOR_NATS)
        ids.append(rollout.response_ids[low])
        owners.append(np.full(int(low.sum()), number))
        teacher.append(rollout.teacher.token_logprobs[low])
        behavior.append(rollout.behavior_logprobs[low])
    all_ids, inverse = np.unique(np.concatenate(ids), return_inverse=True)
    # Distinct (token, rollout) pairs, counted by token.
    pairs = np.unique(np.stack([inverse, np.concatenate(owners)]), axis=1)
    num_rollouts = np.bincount(pairs[0], minlength=len(all_ids))
    num_positions = np.bincount(inverse, minlength=len(all_ids))
    teacher_sum, behavior_sum = (
        np.bincount(inverse, weights=np.concatenate(values), minlength=len(all_ids))
        for values in (teacher, behavior)
    )
    found = [
        MismatchedToken(
            token_id=int(all_ids[i]),
            rollouts=int(num_rollouts[i]),
            teacher_logprob=round(float(teacher_sum[i] / num_positions[i]), 4),
            behavior_logprob=round(float(behavior_sum[i] / num_positions[i]), 4),
        )
        for i in range(len(all_ids))
        if num_rollouts[i] >= max(MIN_ROLLOUTS, MIN_ROLLOUT_SHARE * len(rollouts))
        and behavior_sum[i] / num_positions[i] > STUDENT_SURE_NATS
    ]
    return sorted(found, key=lambda token: (-token["rollouts"], token["token_id"]))
