"""Prompts: JSON lines in, token ids out, in an order that a seed and a step determine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from student_trainer.errors import DatasetError
from student_trainer.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    answer_field: str = "answer",
) -> list[Prompt]:
    """Every problem of a JSON-lines file.

    A line has `prompt` (text) or `messages` (for the chat template), and optionally an answer and
    `id`. Raises DatasetError naming the file, the line and the limit.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: no such dataset; docs/data.md says how to get or write one")
    prompts = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    fields = _fields(where, line)
                    prompts.append(
                        _prompt(where, fields, tokenizer, max_prompt_tokens, answer_field)
                    )
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file in UTF-8: {error}") from None
    if not prompts:
        raise DatasetError(f"{path}: the dataset is empty")
    return prompts


def _fields(where: str, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DatasetError(f"{where}: must be an object, is {type(fields).__name__}")
    return fields


def _prompt(
    where: str,
    fields: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    answer_field: str,
) -> Prompt:
    if "messages" in fields:
        text = _chat_text(where, fields["messages"], tokenizer)
    elif isinstance(fields.get("prompt"), str):
        text = fields["prompt"]
    else:
        raise DatasetError(f"{where}: needs `prompt` (text) or `messages`, has {sorted(fields)}")
    token_ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    if not 1 <= len(token_ids) <= max_prompt_tokens:
        raise DatasetError(
            f"{where}: the prompt has {len(token_ids)} tokens, must be 1 to {max_prompt_tokens}"
        )
    answer = fields.get(answer_field)
    return Prompt(
        prompt_id=str(fields.get("id", where)),
        text=text,
        token_ids=token_ids,
        answer=None if answer is None else str(answer),
    )


def _chat_text(where: str, messages: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (ValueError, TypeError, TemplateError) as error:
        raise DatasetError(f"{where}: the chat template refuses: {error}") from error


class PromptOrder:
    """Which prompts a step takes: a fresh permutation a pass, determined by the seed alone."""

    def __init__(self, prompts: Sequence[Prompt], *, prompts_per_step: int, seed: int) -> None:
        if prompts_per_step > len(prompts):
            raise DatasetError(
                f"rollout.prompts_per_step is {prompts_per_step}, the dataset has {len(prompts)}"
            )
        self._prompts = prompts
        self.prompts_per_step = prompts_per_step
        self._seed = seed

    def step(self, step: int) -> list[Prompt]:
        """The prompts of a step; a pass drops its last incomplete step."""
        steps_per_pass = len(self._prompts) // self.prompts_per_step
        passes, within = divmod(step, steps_per_pass)
        order = np.random.default_rng((self._seed, passes)).permutation(len(self._prompts))
        start = within * self.prompts_per_step
        return [self._prompts[i] for i in order[start : start + self.prompts_per_step]]
