"""Analysis: what a teacher thinks of responses, for people and notebooks. It is background work: it
weighs less than what trainers ask, and is rendered beside the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from teacher_server.http.analysis import Judge
from teacher_server.http.analysis_bodies import (
    AnalyzeBody,
    AnalyzeItem,
    AnalyzeReply,
    BatchReply,
    CompareBody,
    CompareReply,
)
from teacher_server.http.analyst import (
    Analyst,
    Question,
    mean_logprob,
    timing_to_json,
    warnings_to_json,
)
from teacher_server.http.deps import HttpDeps
from teacher_server.http.failures import item_failure
from teacher_server.http.json_route import JsonRoute
from teacher_server.http.rendering import (
    ARROW,
    JSON,
    LINES,
    arrow_stream,
    form_of,
    json_bytes,
    json_line,
)
from teacher_server.scoring.judging import joined
from teacher_wire.errors import InvalidRequestError, TeacherError
from teacher_wire.records import Scores

MAX_JSON_ENTRIES = 1_048_576
"""Largest sum of T * (K + C) that leaves as one JSON object: some 20 MB."""
MAX_ARROW_ENTRIES = 8 * MAX_JSON_ENTRIES
AT_ONCE = 8
"""Items of one request that are scored side by side."""

_FORMS: dict[int | str, dict[str, Any]] = {200: {"content": {ARROW: {}, LINES: {}}}}


def routes(deps: HttpDeps) -> APIRouter:
    """/v1/analyze and /v1/compare."""
    router = APIRouter(prefix="/v1", dependencies=deps.token_in_schema(), route_class=JsonRoute)
    analyst = Analyst(deps.info, deps.sessions, deps.tokenizer)

    @router.post("/analyze", response_model=AnalyzeReply | BatchReply, responses=_FORMS)
    async def analyze(body: AnalyzeBody, request: Request) -> Response:
        """What the teacher thinks of each token of a response, in columns; of several responses
        with `items`. Accept chooses the form: application/json, application/x-ndjson (pieces of
        rows as they are scored) or application/vnd.apache.arrow.stream (a table)."""
        deps.refuse_unless_ready()
        desk = _Desk(analyst, request, form_of(request.headers.get("accept", "")))
        if body.items is None:
            return await desk.one(body)
        return await desk.many(body.items)

    @router.post("/compare", response_model=CompareReply)
    async def compare(body: CompareBody, request: Request) -> Response:
        """Several responses to one prompt, or several policies on one response: each response is
        scored once and judged by every policy."""
        deps.refuse_unless_ready()
        return await _Desk(analyst, request, JSON).compared(body)

    return router


class _Desk:
    """One request at work."""

    def __init__(self, analyst: Analyst, request: Request, form: str) -> None:
        self._analyst = analyst
        self._tenant: str = request.state.tenant
        self._request = request
        self._form = form
        self._places = asyncio.Semaphore(AT_ONCE)

    async def one(self, body: AnalyzeItem) -> Response:
        """A report."""
        desk, form = self._analyst.at_the_desk, self._form
        question = await desk(partial(self._analyst.question_of, body))
        if form == LINES:
            # The first piece comes first, so that what is refused has a status of its own.
            pieces = self._analyst.pieces(question, self._tenant)
            first = await anext(pieces)
            return StreamingResponse(self._lines(question, first, pieces), media_type=LINES)
        self._refuse_too_many([question])
        scores = await self._analyst.scored(question, self._tenant)

        def render() -> bytes:
            report = self._analyst.report(question, scores)
            return json_bytes(report) if form == JSON else arrow_stream([(0, report)], {})

        return Response(await desk(render), media_type=form)

    async def many(self, items: Sequence[AnalyzeItem]) -> Response:
        """A report or an error for each item."""
        questions = await self._each(
            [partial(self._asked, partial(self._analyst.question_of, item)) for item in items]
        )
        self._refuse_too_many([q for q in questions if isinstance(q, Question)])
        if self._form == LINES:
            return StreamingResponse(self._item_lines(questions), media_type=LINES)
        reports = await self._each([partial(self._report, question) for question in questions])
        content = await self._analyst.at_the_desk(partial(self._render, reports))
        return Response(content, media_type=self._form)

    def _render(self, reports: Sequence[dict[str, Any]]) -> bytes:
        if self._form == JSON:
            return json_bytes({"items": list(reports)})
        good = [(index, report) for index, report in enumerate(reports) if "error" not in report]
        errors = {index: each["error"] for index, each in enumerate(reports) if "error" in each}
        return arrow_stream(good, {"errors": errors})

    async def compared(self, body: CompareBody) -> Response:
        """CompareReply."""
        analyst = self._analyst
        prompt = await analyst.at_the_desk(partial(analyst.prompt, body))
        questions = await self._each(
            [
                partial(
                    self._asked,
                    partial(
                        analyst.compared, prompt, each, body.policies, body.k, body.temperature
                    ),
                )
                for each in body.responses
            ]
        )
        good = [question for question in questions if isinstance(question, Question)]
        self._refuse_too_many(good)
        first_ids = good[0].span.token_ids if good else prompt.ids
        scores = await self._each([partial(self._scores, question) for question in questions])

        def render() -> bytes:
            reports: list[dict[str, Any]] = []
            for each, question, found in zip(body.responses, questions, scores, strict=True):
                made = found
                if isinstance(question, Question) and isinstance(found, Scores):
                    made = self._made(partial(analyst.compared_report, question, found, first_ids))
                reports.append({"name": each.name, **made})
            ids = [
                array
                for report in reports
                if "error" not in report
                for array in (
                    report["response_ids"],
                    report["teacher_topk_ids"],
                    report["candidate_ids"],
                )
            ]
            return json_bytes(
                {
                    "model_id": analyst.info.model_id,
                    "prompt_ids": prompt.ids,
                    "k": body.k,
                    "temperature": body.temperature,
                    "texts": analyst.texts_of(prompt.ids, *ids),
                    "warnings": warnings_to_json(*prompt.warnings),
                    "responses": reports,
                }
            )

        return Response(await analyst.at_the_desk(render), media_type=JSON)

    async def _each(self, works: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
        """What each gives, AT_ONCE at a time."""

        async def placed(work: Callable[[], Awaitable[Any]]) -> Any:
            async with self._places:
                return await work()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(placed(work)) for work in works]
        return [task.result() for task in tasks]

    async def _asked(self, ask: Callable[[], Question]) -> Question | dict[str, Any]:
        try:
            return await self._analyst.at_the_desk(ask)
        except TeacherError as error:
            return self._failed(error)

    async def _scores(self, question: Question | dict[str, Any]) -> Scores | dict[str, Any]:
        if not isinstance(question, Question):
            return question
        try:
            return await self._analyst.scored(question, self._tenant)
        except TeacherError as error:
            return self._failed(error)

    async def _report(self, question: Question | dict[str, Any]) -> dict[str, Any]:
        scores = await self._scores(question)
        if not isinstance(question, Question) or not isinstance(scores, Scores):
            return scores  # type: ignore[return-value]
        work = partial(self._made, partial(self._analyst.report, question, scores))
        return await self._analyst.at_the_desk(work)

    def _made(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return make()
        except TeacherError as error:
            return self._failed(error)

    def _failed(self, error: TeacherError) -> dict[str, Any]:
        return item_failure(self._request, error)

    def _refuse_too_many(self, questions: Sequence[Question]) -> None:
        limits = {JSON: MAX_JSON_ENTRIES, ARROW: MAX_ARROW_ENTRIES}
        limit = limits.get(self._form)
        entries = sum(question.num_entries for question in questions)
        if limit is not None and entries > limit:
            tokens = sum(len(question.span) for question in questions)
            raise InvalidRequestError(
                f"{tokens} response tokens with k and candidate_ids are {entries} entries, the "
                f"limit of {self._form} is {limit}: send fewer at once, lower k, or ask for "
                f"accept: {LINES}"
            )

    async def _item_lines(
        self, questions: Sequence[Question | dict[str, Any]]
    ) -> AsyncIterator[bytes]:
        for index, question in enumerate(questions):
            if isinstance(question, Question):
                pieces = self._analyst.pieces(question, self._tenant)
                async for line in self._lines(question, None, pieces, {"item": index}):
                    yield line
            else:
                yield json_line({"item": index, **question})

    async def _lines(
        self,
        question: Question,
        first: Scores | None,
        pieces: AsyncIterator[Scores],
        mark: dict[str, Any] | None = None,
    ) -> AsyncIterator[bytes]:
        """A line for what was asked, one a piece of rows, one for what follows from all."""
        analyst, marked = self._analyst, mark or {}
        judge = Judge(question.policies[0] if question.policies else None)
        parts: list[Scores] = []

        def begin() -> bytes:
            return json_line(
                {
                    **marked,
                    "model_id": analyst.info.model_id,
                    **question.head(),
                    "num_tokens": len(question.span),
                    "texts": analyst.texts_of(question.prompt.ids),
                    "warnings": warnings_to_json(*question.prompt.warnings, *question.warnings),
                }
            )

        def piece(scores: Scores) -> bytes:
            span, columns = analyst.columns(question, scores.rows)
            shown = (span.token_ids, columns["teacher_topk_ids"], span.candidate_ids)
            return json_line(
                {
                    **marked,
                    "offset": scores.rows.offset,
                    "texts": analyst.texts_of(*shown),
                    "response_ids": span.token_ids,
                    **columns,
                    **judge.columns(scores.rows, span),
                }
            )

        def end() -> bytes:
            whole = joined(parts)
            return json_line(
                {
                    **marked,
                    "mean_logprob": mean_logprob(whole.rows.token_logprobs),
                    **judge.summary(),
                    "timing": timing_to_json(whole.timing),
                }
            )

        try:
            async with aclosing(pieces):  # type: ignore[type-var]
                yield await analyst.at_the_desk(begin)
                scores = first if first is not None else await anext(pieces, None)
                while scores is not None:
                    parts.append(scores)
                    yield await analyst.at_the_desk(partial(piece, scores))
                    scores = await anext(pieces, None)
                yield await analyst.at_the_desk(end)
        except TeacherError as error:
            yield json_line({**marked, **self._failed(error)})
