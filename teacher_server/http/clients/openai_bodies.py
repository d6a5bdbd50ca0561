"""Requests and answers of OpenAI's shape, as vLLM's server has them. Requests are parsed into their
models; answers are written straight from arrays, and their models are for the published schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from teacher_server.http.clients.asking import MAX_TEXTS
from teacher_wire.records import MAX_TEMPERATURE

Id = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=2**20, fail_fast=True)]
Text = Annotated[str, Field(strict=True, min_length=1, max_length=2**20)]
Flag = Annotated[bool, Field(strict=True)]
Temperature = Annotated[float, Field(strict=True, ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)]
NumTokens = Annotated[int, Field(strict=True, ge=0)]
Width = Annotated[int, Field(strict=True, ge=-1, lt=2**31)]
"""Of top log-probs; -1 is the whole vocabulary."""


_MANY = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)
SeveralTexts = Annotated[list[Text], _MANY]
SeveralIds = Annotated[list[Ids], _MANY]


class Lenient(BaseModel):
    """A request whose unknown fields are looked at for what is refused, and else ignored."""

    model_config = ConfigDict(extra="allow", frozen=True)


class CompletionBody(Lenient):
    """One or several texts of which every token is scored; nothing is generated."""

    model: str | None = None
    prompt: Text | Ids | SeveralTexts | SeveralIds
    max_tokens: NumTokens | None = None
    """0 or 1, and either generates nothing."""
    temperature: Temperature | None = None
    """At which the texts are scored; 0 is 1."""
    prompt_logprobs: Width | None = None
    """Likeliest tokens of each position besides its own; 0: its own alone."""
    logprobs: Annotated[int, Field(strict=True, ge=0)] | None = None
    """The same in OpenAI's form; with echo."""
    echo: Flag = False
    return_token_ids: Flag | None = None
    return_tokens_as_token_ids: Flag | None = None
    add_special_tokens: Flag = True
    """Let the tokenizer add its special tokens to a text."""


class Usage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: dict[str, int] | None
    """`cached_tokens`: of which the rows were kept from an earlier call."""


class Logprob(BaseModel):
    """One entry of a position."""

    logprob: float
    rank: int
    """1 is the likeliest."""
    decoded_token: str | None


PromptLogprobs = list[dict[str, Logprob] | None]
"""By token id; null for the first token."""


class OpenaiLogprobs(BaseModel):
    """Four lists with an entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: OpenaiLogprobs | None
    finish_reason: Literal["length"]
    stop_reason: None
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None


class CompletionReply(BaseModel):
    """An entry a text, in their order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    temperature: float
    """At which the texts were scored."""
    usage: Usage
    choices: list[CompletionChoice]


class SamplingParams(Lenient):
    """What is read of vLLM's sampling parameters."""

    max_tokens: NumTokens | None = None
    temperature: Temperature | None = None
    prompt_logprobs: Width | None = None


class GenerateBody(Lenient):
    """One text as token ids, for vLLM's tokens-in, tokens-out endpoint."""

    request_id: Annotated[str, Field(strict=True, max_length=256)] | None = None
    model: str | None = None
    token_ids: Ids
    sampling_params: SamplingParams
    return_token_ids: Flag | None = None


class GenerateChoice(BaseModel):
    """Nothing was generated."""

    index: int
    finish_reason: Literal["length"]
    stop_reason: None
    token_ids: list[int]
    logprobs: None


class GenerateReply(BaseModel):
    """What vLLM's GenerateResponse reads."""

    request_id: str
    model: str
    created: int
    usage: Usage
    output_mode: Literal["tokens"]
    prompt_token_ids: list[int] | None
    temperature: float
    """At which the text was scored."""
    choices: list[GenerateChoice]
    prompt_logprobs: PromptLogprobs | None


class TokenizeBody(Lenient):
    """A text to make token ids of."""

    model: str | None = None
    prompt: Text
    add_special_tokens: Flag = True
    return_token_strs: Flag | None = None


class TokenizeReply(BaseModel):
    """The token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    permission: list[Any]


class ModelList(BaseModel):
    """One model."""

    object: Literal["list"]
    data: list[ModelCard]


class Version(BaseModel):
    """Of the server."""

    version: str


class ShapedDetail(BaseModel):
    """A failure as vLLM's server tells it."""

    message: str
    type: str
    param: str | None
    code: int
    """The HTTP status."""


class ShapedError(BaseModel):
    """The body of every answer that is not 200."""

    error: ShapedDetail


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ShapedError, "description": "Refused; the message names field and remedy."},
    "5XX": {"model": ShapedError, "description": "The teacher is not ready, or failed."},
}
"""What the routes of this shape may answer besides 200."""
