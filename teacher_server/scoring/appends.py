"""One append: a span of a session is scored and judged, and the session advances by it.

Knows no other session.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from teacher_server.engine.base import ScoreQuery
from teacher_server.metrics.server import Metrics
from teacher_server.scoring.judging import check_rows, judged_rows
from teacher_server.scoring.scorer import Scorer
from teacher_server.scoring.session import Session
from teacher_server.scoring.validation import check_span, check_total_length
from teacher_wire.errors import SessionOffsetError
from teacher_wire.records import ScoreRows, Scores, TeacherInfo, Timing, TokenSpan


class Appends:
    """Of all sessions of a server."""

    def __init__(
        self, scorer: Scorer, info: TeacherInfo, *, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._scorer = scorer
        self._info = info
        self._metrics = metrics
        self._clock = clock

    async def score(self, session: Session, span: TokenSpan, give_up: float | None) -> Scores:
        """The answer to one append, by which the session has advanced; one that fails changes
        nothing. `give_up` is a time of the clock. Raises as SessionTable.append."""
        check_span(self._info, session.options, session.policy, span)
        offset, length = span.offset, len(session.scored_ids)
        if offset > length:
            raise SessionOffsetError(
                f"append at {offset}, but the session has {length} scored tokens",
                expected_offset=length,
                offset=offset,
            )
        first = session.opened_at.num_tokens
        if offset < first:
            raise SessionOffsetError(
                f"append at {offset}, but the session was opened at {first}: open it again",
                expected_offset=first,
                offset=offset,
            )
        num_tokens = len(span)
        check_total_length(self._info, len(session.prompt_ids) + offset + num_tokens)
        rows, timing = await self._rows(session, span, give_up)
        state, verdict, keep_tokens = session.take_in(span, rows.bad_events)
        session.tally.tokens_scored += num_tokens
        if keep_tokens is not None:
            session.tally.truncated += 1
        self._metrics.append_done(timing)
        return Scores(
            rows=rows, drift=state, verdict=verdict, keep_tokens=keep_tokens, timing=timing
        )

    async def _rows(
        self, session: Session, span: TokenSpan, give_up: float | None
    ) -> tuple[ScoreRows, Timing]:
        options = session.options
        prefix = [session.prompt_ids, session.scored_ids[: span.offset], span.token_ids]
        query = ScoreQuery(
            token_ids=np.concatenate(prefix),
            first_row=len(session.prompt_ids) + span.offset,
            candidate_ids=span.candidate_ids,
            k=options.k,
            temperature=options.temperature,
            extras=options.extras,
            excluded_ids=options.excluded_ids,
            session=session.engine_name,
            cache_salt=session.tenant,
        )
        left_s = None if give_up is None else give_up - self._clock()
        try:
            rows, timing = await self._scorer.score(
                query,
                tenant=session.tenant,
                deadline_s=left_s,
                background=session.background,
                more_follows=session.is_stream,
            )
            check_rows(rows, query)
        except BaseException as error:
            session.tally.failed(error)
            raise
        session.tally.admitted += 1
        return judged_rows(rows, span, session.policy), timing
