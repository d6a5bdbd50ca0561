"""Where a response ends: the ids of every token that ends it.

A base model's tokenizer, its generation_config and its teacher may each name another end token. All
of them end a rollout, so that a student can learn the teacher's; and all of them belong into the
generation_config of the student that is saved, or it would not stop where it was trained to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from student_trainer.errors import ConfigError
from teacher_wire.end_tokens import united

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    stop_tokens: Iterable[str] = (),
) -> tuple[int, ...]:
    """Ids at which rollouts end, in order: the tokenizer's end token first, then those of the
    generation_config, then the named ones.

    Raises ConfigError for a name that is not one token.
    """
    named = tuple(stop_tokens)
    # A dictionary of every token, made anew: not for none of them.
    vocabulary = tokenizer.get_vocab() if named else {}
    for token in named:
        if token not in vocabulary:
            raise ConfigError(
                f"rollout.stop_tokens: {token!r} is not one token of the vocabulary; text of "
                "several tokens goes into rollout.stop_strings"
            )
    return united(
        tokenizer.eos_token_id, generation.eos_token_id, [vocabulary[token] for token in named]
    )


def own_end_warnings(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> list[str]:
    """What is to be said when a student's tokenizer and generation_config end differently."""
    own, configured = tokenizer.eos_token_id, united(generation.eos_token_id)
    if own is None or not configured or own in configured:
        return []
    return [
        f"the student's tokenizer ends with {_named(tokenizer, [own])}, its generation_config with "
        f"{_named(tokenizer, configured)}: rollouts end at each of them"
    ]


def teacher_end_warnings(
    tokenizer: PreTrainedTokenizerBase, teacher_ends: Sequence[int], stop_ids: Sequence[int]
) -> list[str]:
    """What is to be said when no rollout ends as a teacher does that says how it ends."""
    if not teacher_ends or set(teacher_ends) & set(stop_ids):
        return []
    return [
        f"the teacher ends with {_named(tokenizer, teacher_ends)}, at which no rollout ends: they "
        f"end at {_named(tokenizer, stop_ids) or 'no token'}; name it in rollout.stop_tokens"
    ]


def _named(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in token_ids)
