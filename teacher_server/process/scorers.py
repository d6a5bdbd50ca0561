"""Who scores the rollouts of a file: a checkpoint in this process, or a teacher that runs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_client.access import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, TeacherAccess
from teacher_client.client import TeacherClient
from teacher_server.engine.base import ScoreQuery, ScoringEngine
from teacher_server.process.loading import build_engine
from teacher_server.scoring.judging import check_rows, judged_rows
from teacher_server.settings import ConfigError, TeacherConfig
from teacher_wire import drift
from teacher_wire.records import (
    DriftPolicy,
    DriftState,
    ScoreOptions,
    Scores,
    Timing,
    TokenSpan,
    Verdict,
)

CONNECT_S = 10.0


class Score(Protocol):
    """Scores one whole response."""

    async def __call__(
        self,
        prompt_ids: NDArray[np.int32],
        span: TokenSpan,
        options: ScoreOptions,
        policy: DriftPolicy | None,
    ) -> Scores: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Whoever scores, and its limits."""

    model_id: str
    vocab_size: int
    max_context: int
    max_k: int
    score: Score


@asynccontextmanager
async def loaded(config: TeacherConfig) -> AsyncIterator[Teacher]:
    """A checkpoint in this process. Raises ConfigError, and EngineError for one that does not
    load."""
    try:
        engine = build_engine(config)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read the checkpoint {config.model!r}: {error}") from error
    await engine.start()
    info = engine.info
    try:
        yield Teacher(
            model_id=config.model,
            vocab_size=info.vocab_size,
            max_context=info.max_context,
            max_k=info.max_k,
            score=partial(_score_here, engine),
        )
    finally:
        await engine.close()


async def _score_here(
    engine: ScoringEngine,
    prompt_ids: NDArray[np.int32],
    span: TokenSpan,
    options: ScoreOptions,
    policy: DriftPolicy | None,
) -> Scores:
    """As a server does it, without one."""
    query = ScoreQuery(
        token_ids=np.concatenate([prompt_ids, span.token_ids]),
        first_row=len(prompt_ids),
        candidate_ids=span.candidate_ids,
        k=options.k,
        temperature=options.temperature,
        extras=options.extras,
    )
    rows = await engine.score(query)
    check_rows(rows, query)
    judged = judged_rows(rows, span, policy)
    state, verdict, keep = None, Verdict.CONTINUE, None
    if policy is not None and judged.bad_events is not None:
        state, verdict, keep = drift.advance(policy, DriftState(), judged.bad_events)
    return Scores(rows=judged, drift=state, verdict=verdict, keep_tokens=keep, timing=Timing())


@asynccontextmanager
async def running(
    address: str, *, token_file: Path | None, tls_ca: Path | None
) -> AsyncIterator[Teacher]:
    """A teacher that runs, asked as a trainer asks it. Raises NotReadyError, AccessError, and what
    turns it away."""
    named = os.environ.get(TOKEN_FILE_VARIABLE)
    client = await TeacherClient.connect(
        [address],
        tokenizer_fingerprint="",
        vocab_size=0,
        run_id="analyze",
        connect_timeout_s=CONNECT_S,
        access=TeacherAccess(
            token_file=token_file or (Path(named) if named else None),
            token=os.environ.get(TOKEN_VARIABLE, ""),
            tls_ca=tls_ca,
        ),
    )
    try:
        info = client.info
        yield Teacher(
            model_id=info.model_id,
            vocab_size=info.vocab_size,
            max_context=info.max_context,
            max_k=info.max_k,
            score=client.score,
        )
    finally:
        await client.aclose()
