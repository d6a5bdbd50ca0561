"""What a student has of its teacher on held-out prompts: exact, over the whole vocabulary.

The student answers by itself, both models read each answer, and every figure is of their
distributions at the temperature of sampling. Plain transformers with both models in memory: nothing
of the trainer, of the service or of a top-k takes part.

Legend: T = tokens of a response, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.diagnostics.repetition import repetition_rate
from student_trainer.evaluation.divergence import mean_over_tokens
from student_trainer.records import Prompt

BATCH_PROMPTS = 32
OVERLAP_K = 16
"""Leading entries of both that are compared."""
REPEATED_GRAM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled answer."""

    prompt_id: str
    sample: int
    """Which of the prompt's answers."""
    prompt_ids: list[int]
    response_ids: list[int]
    """With the end token, where it ended by itself."""
    ended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """What every token of one response says, [T] each, in nats but for overlap and agreement."""

    reverse_kl: Tensor
    """KL(student || teacher), the sum over V."""
    forward_kl: Tensor
    """KL(teacher || student)."""
    teacher_logprob: Tensor
    """Of the sampled token."""
    student_entropy: Tensor
    teacher_entropy: Tensor
    overlap: Tensor
    """Share of the OVERLAP_K most likely tokens that both name."""
    same_first: Tensor
    """1.0 where both name the same token first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Means over tokens, or over responses where it says so."""

    reverse_kl: float
    reverse_kl_error: float | None
    """Standard error; the prompts are the independent draws. None of a single one."""
    forward_kl: float
    teacher_logprob: float
    student_entropy: float
    teacher_entropy: float
    overlap: float
    same_first: float
    length: float
    """Tokens of a response."""
    end_rate: float
    """Share of the responses that ended by themselves within the limit."""
    loop_rate: float
    """Share of a response's tokens in a loop, mean over responses: student_trainer's definition."""
    repeated_rate: float
    """Share of the tokens that end a run of REPEATED_GRAM tokens said before, mean over responses;
    of longer ones more, so models of other lengths are compared by `at_positions_of`."""
    num_responses: int
    num_tokens: int
    overlap_by_position: list[float]
    """Mean overlap at each position, over the responses that reach it."""
    repeated_by_position: list[float]
    """Share of those whose last REPEATED_GRAM tokens stand earlier in the same response."""
    responses_by_position: list[int]

    def values(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[Response]:
    """Answers to each prompt, drawn from the whole distribution at a temperature."""
    torch.manual_seed(seed)
    asked = [(prompt, number) for prompt in prompts for number in range(num_samples)]
    found = []
    for start in range(0, len(asked), BATCH_PROMPTS):
        batch = asked[start : start + BATCH_PROMPTS]
        rows = [{"input_ids": prompt.token_ids.tolist()} for prompt, _ in batch]
        padded = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        output = model.generate(
            **padded,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_tokens,
        )
        for (prompt, number), row in zip(batch, output, strict=True):
            ids = row[padded["input_ids"].shape[1] :].tolist()
            length, ended = _own_length(ids, tokenizer.eos_token_id)
            found.append(
                Response(
                    prompt_id=prompt.prompt_id,
                    sample=number,
                    prompt_ids=prompt.token_ids.tolist(),
                    response_ids=ids[:length],
                    ended=ended,
                )
            )
    return found


def _own_length(ids: Sequence[int], end: int) -> tuple[int, bool]:
    """Tokens up to the first end token and with it; whether there is one."""
    if end in ids:
        return ids.index(end) + 1, True
    return len(ids), False


@torch.no_grad()
def positions(
    student: PreTrainedModel, teacher: PreTrainedModel, response: Response, *, temperature: float
) -> Positions:
    """Both models' distributions at every token of a response, compared."""
    student_TV = _log_probs(student, response, temperature)
    teacher_TV = _log_probs(teacher, response, temperature)
    sampled_T1 = torch.tensor(response.response_ids)[:, None]
    ratio_TV = student_TV - teacher_TV
    student_top = student_TV.topk(OVERLAP_K).indices
    teacher_top = teacher_TV.topk(OVERLAP_K).indices
    shared = (student_top[:, :, None] == teacher_top[:, None, :]).any(-1)
    return Positions(
        reverse_kl=(student_TV.exp() * ratio_TV).sum(-1),
        forward_kl=-(teacher_TV.exp() * ratio_TV).sum(-1),
        teacher_logprob=teacher_TV.gather(-1, sampled_T1)[:, 0],
        student_entropy=-(student_TV.exp() * student_TV).sum(-1),
        teacher_entropy=-(teacher_TV.exp() * teacher_TV).sum(-1),
        overlap=shared.float().mean(-1),
        same_first=(student_top[:, 0] == teacher_top[:, 0]).float(),
    )


def _log_probs(model: PreTrainedModel, response: Response, temperature: float) -> Tensor:
    """[T, V] of the tokens of the response: row t is what is predicted before it is seen."""
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    length = len(response.response_ids)
    logits_TV = model(ids[:, :-1], use_cache=False, logits_to_keep=length).logits[0]
    return torch.log_softmax(logits_TV.float() / temperature, dim=-1)


def figures(responses: Sequence[Response], compared: Sequence[Positions]) -> Figures:
    """Sums up responses and what was compared at their tokens."""
    names = [field.name for field in fields(Positions)]
    joined = {name: torch.cat([getattr(p, name) for p in compared]) for name in names}
    ids = [np.asarray(response.response_ids, np.int32) for response in responses]
    repeated = [repeats(row) for row in ids]
    error = mean_over_tokens(
        [p.reverse_kl.double().numpy() for p in compared],
        [response.prompt_id for response in responses],
    )
    return Figures(
        **{name: float(values.double().mean()) for name, values in joined.items()},
        reverse_kl_error=error.standard_error if error else None,
        length=float(np.mean([len(row) for row in ids])),
        end_rate=float(np.mean([response.ended for response in responses])),
        loop_rate=float(np.mean([repetition_rate(row) for row in ids])),
        repeated_rate=float(np.mean([row.mean() for row in repeated])),
        num_responses=len(responses),
        num_tokens=len(joined["overlap"]),
        overlap_by_position=_by_position([p.overlap.numpy() for p in compared]),
        repeated_by_position=_by_position(repeated),
        responses_by_position=[
            sum(len(row) > position for row in ids) for position in range(max(map(len, ids)))
        ],
    )


def repeats(ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[T] True where the last REPEATED_GRAM tokens stand earlier in the same response."""
    said, found = set(), np.zeros(len(ids), np.bool_)
    for end in range(REPEATED_GRAM, len(ids) + 1):
        gram = tuple(ids[end - REPEATED_GRAM : end].tolist())
        found[end - 1] = gram in said
        said.add(gram)
    return found


def at_positions_of(
    weights: Sequence[int], by_position: Sequence[float], responses: Sequence[int]
) -> float:
    """A rate by position as the mean that it would have with another model's lengths.

    Args:
        weights: how many of that model's responses reach each position.
        by_position: the rate at each position.
        responses: how many responses it is of; positions that none reaches count nowhere.
    """
    both = min(len(weights), len(responses))
    return float(np.average(by_position[:both], weights=weights[:both]))


def _by_position(rows: Sequence[NDArray[Any]]) -> list[float]:
    """Mean at each position over the rows that reach it."""
    sums, counts = np.zeros(max(map(len, rows))), np.zeros(max(map(len, rows)))
    for row in rows:
        sums[: len(row)] += row
        counts[: len(row)] += 1
    return [round(float(value), 4) for value in sums / counts]
