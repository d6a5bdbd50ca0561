"""From a question about a response to a report: its ids, its scores as background work, its
columns. Texts and reports are made in a thread of their own, because the loop also carries the gRPC
streams; in one, so that they share what of the interpreter the streams leave. Knows no form of a
reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from teacher_server.http.analysis import Columns, Judge, ids_in, model_columns
from teacher_server.http.analysis_bodies import (
    AnalyzeItem,
    ComparedResponse,
    PromptBody,
    ResponseBody,
    resolved_policy,
    widest,
)
from teacher_server.http.rows import refuse_non_finite
from teacher_server.http.texts import TextWarning, Tokenizer, Tokenizing, TokenTexts
from teacher_server.scoring.judging import joined
from teacher_server.scoring.sessions import SessionTable
from teacher_server.scoring.validation import check_ids
from teacher_wire.records import (
    ROW_FLAGS,
    DriftPolicy,
    ScoreOptions,
    ScoreRows,
    Scores,
    TeacherInfo,
    Timing,
    TokenSpan,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a response follows."""

    ids: NDArray[np.int32]
    warnings: tuple[TextWarning, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One response, checked and ready to be scored."""

    prompt: Prompt
    span: TokenSpan
    k: int
    """The top-k that is shown."""
    temperature: float
    policies: tuple[DriftPolicy, ...]
    warnings: tuple[TextWarning, ...]
    """Of the response."""

    def options(self) -> ScoreOptions:
        """Every column, and a top-k as wide as every policy looks."""
        flags: dict[str, Any] = dict.fromkeys(ROW_FLAGS, True)
        return ScoreOptions(k=widest(self.policies, self.k), temperature=self.temperature, **flags)

    @property
    def num_entries(self) -> int:
        """Numbers of a report that grow with both its length and its width."""
        candidates = self.span.candidate_ids
        return len(self.span) * (self.k + (0 if candidates is None else candidates.shape[1]))

    def head(self) -> dict[str, Any]:
        """What was asked, as a report repeats it."""
        return {
            "prompt_ids": self.prompt.ids,
            "k": self.k,
            "temperature": self.temperature,
        }


class Analyst:
    """Answers questions about responses to one teacher."""

    def __init__(
        self, info: TeacherInfo, sessions: SessionTable, tokenizer: Tokenizer | None
    ) -> None:
        self.info = info
        self.texts = TokenTexts(tokenizer)
        self._sessions = sessions
        self._tokenizing = Tokenizing(tokenizer)
        self._special_ids = np.array(info.special_token_ids, np.int32)
        self._desk = ThreadPoolExecutor(1, thread_name_prefix="analysis")

    async def at_the_desk(self, work: Callable[[], T]) -> T:
        """What the work gives, done beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._desk, work)

    def prompt(self, body: PromptBody) -> Prompt:
        """The ids of a prompt in any form. Raises InvalidRequestError."""
        if body.prompt_ids is not None:
            return Prompt(ids=np.array(body.prompt_ids, np.int32), warnings=())
        if body.messages is not None:
            turns = [dict(message) for message in body.messages]
            text = self._tokenizing.conversation(turns, body.chat_template_kwargs)
            ids, warnings = self._tokenizing.ids("messages", text)
        else:
            assert body.prompt is not None
            ids, warnings = self._tokenizing.ids(
                "prompt", body.prompt, add_special_tokens=body.add_special_tokens
            )
        return Prompt(ids=ids, warnings=tuple(warnings))

    def question(
        self,
        prompt: Prompt,
        body: ResponseBody,
        policies: Sequence[Any],
        *,
        k: int,
        temperature: float,
    ) -> Question:
        """One response to a prompt. Texts are tokenised apart, as a response never shares a token.
        Raises InvalidRequestError."""
        warnings: list[TextWarning] = []
        if body.response_ids is not None:
            ids = np.array(body.response_ids, np.int32)
        else:
            assert body.response is not None
            ids, warnings = self._tokenizing.ids("response", body.response)
        check_ids(prompt.ids, "prompt_ids", self.info.vocab_size)
        check_ids(ids, "response_ids", self.info.vocab_size)
        candidates = body.candidate_array()
        num_candidates = 0 if candidates is None else candidates.shape[1]
        return Question(
            prompt=prompt,
            span=TokenSpan(
                offset=0,
                token_ids=ids,
                candidate_ids=candidates,
                event_mask=~np.isin(ids, self._special_ids),
            ),
            k=k,
            temperature=temperature,
            policies=tuple(
                resolved_policy(policy, k=k, num_candidates=num_candidates, max_k=self.info.max_k)
                for policy in policies
            ),
            warnings=tuple(warnings),
        )

    def question_of(self, body: AnalyzeItem) -> Question:
        """That of one item. Raises InvalidRequestError."""
        policies = [] if body.policy is None else [body.policy]
        return self.question(
            self.prompt(body), body, policies, k=body.k, temperature=body.temperature
        )

    def compared(
        self, prompt: Prompt, body: ComparedResponse, policies: Sequence[Any], k: int, t: float
    ) -> Question:
        """That of one of several responses. Raises InvalidRequestError."""
        return self.question(prompt, body, policies, k=k, temperature=t)

    def pieces(self, question: Question, tenant: str) -> AsyncIterator[Scores]:
        """Its scores as they come."""
        return self._sessions.score_in_pieces(
            question.prompt.ids,
            question.span,
            question.options(),
            None,
            tenant=tenant,
            background=True,
        )

    async def scored(self, question: Question, tenant: str) -> Scores:
        """Its scores, all together."""
        return joined([part async for part in self.pieces(question, tenant)])

    def columns(self, question: Question, rows: ScoreRows) -> tuple[TokenSpan, Columns]:
        """The tokens of these rows, and what the model says of them.

        Raises NonFiniteError for a number that is not finite.
        """
        refuse_non_finite(rows)
        span, where = question.span, slice(rows.offset, rows.offset + len(rows))
        part = TokenSpan(
            offset=rows.offset,
            token_ids=span.token_ids[where],
            candidate_ids=None if span.candidate_ids is None else span.candidate_ids[where],
            event_mask=None if span.event_mask is None else span.event_mask[where],
        )
        return part, model_columns(rows, part, question.k)

    def texts_of(self, *arrays: NDArray[Any] | None) -> dict[str, str]:
        """The text of every id in these arrays."""
        return self.texts.of(ids_in(*arrays))

    def report(self, question: Question, scores: Scores) -> dict[str, Any]:
        """One response under one policy, or none: AnalyzeReply, with arrays for lists."""
        judge = Judge(question.policies[0] if question.policies else None)
        span, columns = self.columns(question, scores.rows)
        judged = judge.columns(scores.rows, span)
        shown = (columns["teacher_topk_ids"], span.candidate_ids)
        return {
            "model_id": self.info.model_id,
            **question.head(),
            "texts": self.texts_of(question.prompt.ids, span.token_ids, *shown),
            "response_ids": span.token_ids,
            **columns,
            **judged,
            "mean_logprob": mean_logprob(scores.rows.token_logprobs),
            **judge.summary(),
            "warnings": warnings_to_json(*question.prompt.warnings, *question.warnings),
            "timing": timing_to_json(scores.timing),
        }

    def compared_report(
        self, question: Question, scores: Scores, first_ids: NDArray[np.int32]
    ) -> dict[str, Any]:
        """One of several responses, under each policy: ComparedReply."""
        span, columns = self.columns(question, scores.rows)
        judgements = []
        for policy in question.policies:
            judge = Judge(policy)
            judgements.append({**judge.columns(scores.rows, span), **judge.summary()})
        return {
            "response_ids": span.token_ids,
            **columns,
            "mean_logprob": mean_logprob(scores.rows.token_logprobs),
            "common_prefix_tokens": common_prefix(span.token_ids, first_ids),
            "judgements": judgements,
            "warnings": warnings_to_json(*question.warnings),
            "timing": timing_to_json(scores.timing),
        }


def mean_logprob(logprobs: NDArray[np.float32]) -> float:
    """nats a token"""
    return float(logprobs.mean(dtype=np.float64))


def common_prefix(ids: NDArray[np.int32], others: NDArray[np.int32]) -> int:
    """Leading tokens that two responses share."""
    length = min(len(ids), len(others))
    differs = np.flatnonzero(ids[:length] != others[:length])
    return int(differs[0]) if len(differs) else length


def warnings_to_json(*warnings: TextWarning) -> list[dict[str, Any]]:
    return [asdict(warning) for warning in warnings]


def timing_to_json(timing: Timing) -> dict[str, Any]:
    return asdict(timing)
