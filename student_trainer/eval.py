"""Exact match and pass@k on held-out problems, with the sampler's present weights."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from transformers import PreTrainedTokenizerBase

from student_trainer.errors import DatasetError
from student_trainer.records import Prompt, SamplingOptions
from student_trainer.rollouts.samplers.base import Sampler

GREEDY = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """What an evaluation saw."""

    accuracy: float
    """Share of problems whose greedy answer is exactly right."""
    pass_at_1: float | None
    """Chance that one sample is right; None when nothing was sampled."""
    pass_at_k: float | None
    """Chance that at least one of k samples is right."""
    num_prompts: int
    mean_tokens: float
    """Length of a greedy response."""


class Grader:
    """Decides whether a response's answer equals the expected one."""

    def __init__(self, answer_pattern: str, *, unicode_normalize: bool) -> None:
        self._pattern = re.compile(answer_pattern)
        self._normalize = unicode_normalize

    def correct(self, response: str, answer: str) -> bool:
        """True when the last match of the pattern holds the answer."""
        if self._normalize:
            response, answer = (unicodedata.normalize("NFKC", s) for s in (response, answer))
        found = [match[1] for match in self._pattern.finditer(response)]
        return bool(found) and found[-1] is not None and found[-1].strip() == answer.strip()


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that k of the samples hold a right one (Chen et al. 2021, eq. 1)."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples with {num_correct} correct")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


async def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_tokens: int,
    num_samples: int = 0,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalResult:
    """Greedy accuracy, and pass@1 and pass@num_samples from samples when num_samples > 0.

    `name` must differ from that of every other evaluation under way. Raises DatasetError for no
    problems and for one without an answer.
    """
    answers = _answers(prompts)
    total, done = len(prompts) * (1 + num_samples), 0

    async def respond(index: int, prompt: Prompt, sample: int) -> tuple[bool, int]:
        nonlocal done
        options = SamplingOptions(
            max_tokens=max_tokens,
            temperature=GREEDY if sample == 0 else temperature,
            seed=sample,
        )
        request_id = f"eval-{name}-{index}-{sample}"
        parts = [
            delta.token_ids
            async for delta in sampler.generate(request_id, prompt.token_ids, options)
        ]
        token_ids = np.concatenate(parts)
        text = str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
        done += 1
        progress(done, total)
        return grader.correct(text, answers[index]), len(token_ids)

    outcomes = await asyncio.gather(
        *(
            respond(index, prompt, sample)
            for index, prompt in enumerate(prompts)
            for sample in range(1 + num_samples)
        )
    )
    correct = np.array([right for right, _ in outcomes]).reshape(len(prompts), 1 + num_samples)
    lengths = np.array([length for _, length in outcomes]).reshape(correct.shape)
    sampled = correct[:, 1:].sum(axis=1)
    return EvalResult(
        accuracy=float(correct[:, 0].mean()),
        pass_at_1=_mean_pass(sampled, num_samples, 1),
        pass_at_k=_mean_pass(sampled, num_samples, num_samples),
        num_prompts=len(prompts),
        mean_tokens=float(lengths[:, 0].mean()),
    )


def _answers(prompts: Sequence[Prompt]) -> list[str]:
    if not prompts:
        raise DatasetError("there are no problems to evaluate; data.heldout names them")
    answers = []
    for prompt in prompts:
        if prompt.answer is None:
            raise DatasetError(f"problem {prompt.prompt_id} has no answer to compare with")
        answers.append(prompt.answer)
    return answers


def _mean_pass(num_correct: np.ndarray, num_samples: int, k: int) -> float | None:
    if num_samples == 0:
        return None
    return float(np.mean([pass_at_k(num_samples, int(c), k) for c in num_correct]))
