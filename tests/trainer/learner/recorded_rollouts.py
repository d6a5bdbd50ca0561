"""Rollouts of the tiny student with the scores of a tiny teacher, as a run would record them.

What is sampled depends on numpy's generator and two seeded models alone. Prompts have several
rollouts each, of different lengths, and one of them is of a single token. The padding's id takes no
part.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from student_trainer.records import Finish, Prompt, Rollout, RolloutTimes
from teacher_wire.records import ScoreRows
from tests.trainer.learner.tiny_student import PAD_ID, VOCAB_SIZE, tiny_student

PROMPT_LENGTHS = (3, 9, 17)
RESPONSE_LENGTHS = (1, 12, 29, 40)
K, J = 6, 4
TEACHER_SEED = 1
TIMES = RolloutTimes(
    started_s=0.0, generated_s=1.0, scored_s=1.0, round_trip_tokens=0, verdict_span_tokens=0
)


def recorded_rollouts(*, seed: int) -> list[Rollout]:
    """Twelve: each prompt once with every length."""
    rng = np.random.default_rng(seed)
    student, teacher = tiny_student(), tiny_student(seed=TEACHER_SEED)
    prompts = [rng.integers(2, VOCAB_SIZE, length).astype(np.int32) for length in PROMPT_LENGTHS]
    return [
        _recorded(student, teacher, prompt, length, rng)
        for prompt in prompts
        for length in RESPONSE_LENGTHS
    ]


def _recorded(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: NDArray[np.int32],
    length: int,
    rng: np.random.Generator,
) -> Rollout:
    ids = list(prompt_ids)
    for draw in rng.random(length):
        shares = np.exp(_logprobs(student, ids, last=1)[0]).cumsum()
        ids.append(min(int(np.searchsorted(shares, draw * shares[-1])), VOCAB_SIZE - 1))
    response = np.array(ids[len(prompt_ids) :], np.int32)
    behavior, scored = (_logprobs(model, ids, last=length + 1)[:-1] for model in (student, teacher))
    rows = np.arange(length)
    student_top = np.argsort(-behavior, kind="stable")[:, :J].astype(np.int32)
    teacher_top = np.argsort(-scored, kind="stable")[:, :K].astype(np.int32)
    mask = np.ones(length, np.bool_)
    mask[4::7] = False
    return Rollout(
        prompt=Prompt(prompt_id=str(len(prompt_ids)), text="", token_ids=prompt_ids, answer=None),
        response_ids=response,
        behavior_logprobs=behavior[rows, response].astype(np.float32),
        student_topk_ids=student_top,
        student_topk_logprobs=np.take_along_axis(behavior, student_top, 1).astype(np.float32),
        mask=mask,
        teacher=ScoreRows(
            offset=0,
            topk_ids=teacher_top,
            topk_logprobs=np.take_along_axis(scored, teacher_top, 1).astype(np.float32),
            token_logprobs=scored[rows, response].astype(np.float32),
            candidate_logprobs=np.take_along_axis(scored, student_top, 1).astype(np.float32),
            bad_events=rows % 5 == 3,
            entropies=-(np.exp(scored) * scored.clip(-1e3)).sum(-1).astype(np.float32),
        ),
        drift=None,
        finish=Finish.LENGTH,
        num_generated=length,
        policy_version=0,
        times=TIMES,
    )


def _logprobs(model: PreTrainedModel, ids: list[int], *, last: int) -> NDArray[np.float64]:
    """float64 [last, V] at the last positions."""
    with torch.no_grad():
        logits_SV = model(input_ids=torch.tensor([ids])).logits[0]
    logits_SV[:, PAD_ID] = -torch.inf
    found: NDArray[np.float64] = logits_SV[-last:].double().log_softmax(-1).numpy()
    return found
