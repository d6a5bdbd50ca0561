"""What the routes of other trainers' clients share: which model, at which temperature, what is
refused and how, and a batch of texts scored side by side.

Knows no shape of a request or an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from teacher_server.http.deps import HttpDeps
from teacher_server.http.texts import turn_of
from teacher_server.scoring.texts import TextScores
from teacher_server.scoring.validation import check_ids
from teacher_wire.errors import CapacityError, InvalidRequestError
from teacher_wire.records import ScoreOptions, TeacherInfo

MAX_TEXTS = 1024
"""Texts in one call."""
MAX_ENTRIES = 2**21
"""Log-probs in one answer, of all texts together; as JSON 60 bytes each."""
AT_ONCE = 8
"""Texts of one call that are scored side by side."""
PATIENCE_S = 30.0
"""How long a text of a call waits for a place where something is full: most of these clients do not
try again when they are told to."""
LOWEST_LOGPROB = -9999.0
"""vLLM's word for minus infinity, which JSON has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One text to score."""

    token_ids: NDArray[np.int32]
    """[L]"""
    options: ScoreOptions
    first_row: int = 1
    candidate_ids: NDArray[np.int32] | None = None
    """[L - first_row, C]"""


@dataclass(frozen=True, slots=True)
class Unless:
    """A field that is refused unless it says no more than leaving it out does."""

    harmless: tuple[object, ...]
    remedy: str


_NO_GENERATING = "this teacher scores, it does not generate"
UNSUPPORTED: Mapping[str, Unless] = {
    "stream": Unless((None, False), "the rows of a text come in one answer: leave it out"),
    "n": Unless((None, 1), f"{_NO_GENERATING}: leave it out"),
    "best_of": Unless((None, 1), f"{_NO_GENERATING}: leave it out"),
    "use_beam_search": Unless((None, False), f"{_NO_GENERATING}: leave it out"),
    "suffix": Unless((None, ""), f"{_NO_GENERATING}: leave it out"),
    "prompt_embeds": Unless((None,), "send the prompt as token ids"),
    "input_embeds": Unless((None,), "send input_ids"),
    "truncate_prompt_tokens": Unless((None, -1), "cut the prompt before it is sent"),
    "prompt_logprob_token_ids": Unless(
        (None,), "POST /generate has token_ids_logprob_positions for it, and gRPC candidate_ids"
    ),
    "image_data": Unless((None, []), "this teacher reads token ids alone: leave it out"),
    "audio_data": Unless((None, []), "this teacher reads token ids alone: leave it out"),
    "video_data": Unless((None, []), "this teacher reads token ids alone: leave it out"),
    "features": Unless((None,), "this teacher reads token ids alone: leave it out"),
    "content_parts": Unless((None, []), "this teacher reads token ids alone: leave it out"),
    "lora_path": Unless((None,), "this teacher serves one model: leave it out"),
    "return_hidden_states": Unless((None, False), "this teacher gives log-probs: leave it out"),
}
"""By field; any other that is not known is ignored, as these clients' own servers do."""


def refuse(field: str, value: object, remedy: str) -> InvalidRequestError:
    """The error for a value that cannot be served: named, with what to do."""
    # Not what is in a list: it may be of any size and depth.
    is_short = isinstance(value, bool | int | float | str) or value is None
    shown = repr(value)[:64] if is_short else f"a {type(value).__name__}"
    return InvalidRequestError(f"{field} is {shown}: {remedy}")


def refuse_unsupported(fields: Mapping[str, Any] | None, where: str = "") -> None:
    """Raises InvalidRequestError for the first field that asks for what there is not."""
    for name, value in (fields or {}).items():
        rule = UNSUPPORTED.get(name)
        if rule is not None and not any(value is h or value == h for h in rule.harmless):
            raise refuse(where + name, value, rule.remedy)


def refuse_generating(field: str, value: int | None) -> None:
    """Of the number of new tokens: 0 and 1 are what clients send that want none."""
    if value is not None and value > 1:
        raise refuse(field, value, f"{_NO_GENERATING}: send 0 or 1, or leave it out")


def check_model(asked: str | None, deps: HttpDeps) -> None:
    """Answers 404 for a model that is not served."""
    if asked is not None and asked not in (deps.model_name, deps.info.model_id):
        raise HTTPException(404, f"The model `{asked}` does not exist. It is `{deps.model_name}`.")


def scored_at(asked: float | None, *, followed: bool = True) -> float:
    """The temperature that a request is scored at: 1 where it says 0 or nothing."""
    return asked if followed and asked else 1.0


def text_ids(ids: Sequence[int], field: str, info: TeacherInfo) -> NDArray[np.int32]:
    """The ids of one text, looked at before any of them is scored. Raises InvalidRequestError."""
    if not 1 <= len(ids) <= info.max_context:
        raise InvalidRequestError(
            f"This model's maximum context length is {info.max_context} tokens. However, {field} "
            f"has {len(ids)} tokens, and must have at least 1"
        )
    token_ids = np.array(ids, np.int32)
    check_ids(token_ids, field, info.vocab_size)
    return token_ids


async def ids_of(texts: Sequence[str], add_special_tokens: bool, deps: HttpDeps) -> list[list[int]]:
    """Token ids of texts. Raises InvalidRequestError where there is no tokenizer."""
    tokenizer = deps.tokenizer
    if tokenizer is None:
        raise InvalidRequestError("this teacher has no tokenizer: send token ids instead of text")

    def encode() -> list[list[int]]:
        with turn_of(tokenizer):
            return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    return await asyncio.to_thread(encode)


def width_of(asked: int, field: str, info: TeacherInfo) -> int:
    """How many of the likeliest tokens are asked for; -1 is the whole vocabulary."""
    width = info.vocab_size if asked == -1 else asked
    if width > info.max_k:
        meant = f"Requested {field} of {asked}" + (f", which is {width}" if asked == -1 else "")
        raise InvalidRequestError(
            f"{meant}, which is greater than max allowed: {info.max_k}. Ask for less, or start the "
            "teacher with a larger --max-k"
        )
    return width


def refuse_too_many(num_texts: int, num_entries: int) -> None:
    """Raises InvalidRequestError for a call whose answer would be too large."""
    if num_texts > MAX_TEXTS:
        raise InvalidRequestError(f"{num_texts} texts in one call, the limit is {MAX_TEXTS}")
    if num_entries > MAX_ENTRIES:
        raise InvalidRequestError(
            f"the answer would have {num_entries} log-probs, the limit is {MAX_ENTRIES}: send "
            "fewer texts a call, or ask for fewer log-probs a token"
        )


async def score_all(deps: HttpDeps, asked: Sequence[Asked], tenant: str) -> list[TextScores]:
    """Scores the texts of one call, AT_ONCE side by side; the first failure gives up the others."""
    loop = asyncio.get_running_loop()
    places, give_up = asyncio.Semaphore(AT_ONCE), loop.time() + PATIENCE_S

    async def one(text: Asked) -> TextScores:
        async with places:
            while True:
                try:
                    return await deps.texts.score(
                        text.token_ids,
                        text.options,
                        tenant=tenant,
                        first_row=text.first_row,
                        candidate_ids=text.candidate_ids,
                    )
                except CapacityError as error:
                    pause_s = error.retry_after_ms / 1000
                    if not pause_s or loop.time() + pause_s > give_up:
                        raise
                    await asyncio.sleep(pause_s)

    tasks = [asyncio.create_task(one(text)) for text in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
