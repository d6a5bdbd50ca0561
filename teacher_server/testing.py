"""A whole teacher in this process, over a real loopback socket, for tests and client
development."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from teacher_server.access.auth import Access
from teacher_server.access.tenants import Tenants
from teacher_server.admission.scheduler import Scheduler, SchedulerLimits
from teacher_server.engine.base import ScoringEngine
from teacher_server.engine.fake_engine import FakeEngine, fake_fingerprint
from teacher_server.metrics.server import Metrics
from teacher_server.process.lifecycle import Phase
from teacher_server.process.parts import Limits, TeacherParts
from teacher_server.rpc.server_options import SERVER_OPTIONS
from teacher_server.rpc.service import TeacherService
from teacher_server.rpc.stream import StreamLimits
from teacher_server.scoring.sessions import SessionTable
from teacher_wire.records import TeacherInfo


def teacher_info(
    engine: ScoringEngine, *, max_sessions: int = 64, max_append_tokens: int = 4096
) -> TeacherInfo:
    """What a teacher with this engine would tell of itself."""
    served = engine.info
    return TeacherInfo(
        model_id=f"fake-{served.vocab_size}",
        revision="",
        weights_digest="",
        dtype=served.dtype,
        vocab_size=served.vocab_size,
        tokenizer_fingerprint=fake_fingerprint(served.vocab_size),
        special_token_ids=(),
        max_k=served.max_k,
        max_context=served.max_context,
        engine=served.name,
        engine_version=served.version,
        instance_id="local",
        max_sessions=max_sessions,
        max_append_tokens=max_append_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTeacher:
    """The parts of a running teacher, to look into."""

    address: str
    info: TeacherInfo
    parts: TeacherParts
    scheduler: Scheduler
    sessions: SessionTable
    service: TeacherService
    metrics: Metrics
    server: grpc.aio.Server


@asynccontextmanager
async def local_teacher(
    engine: ScoringEngine | None = None,
    *,
    port: int = 0,
    info: TeacherInfo | None = None,
    evict_idle_s: float = 0.0,
    scheduler_limits: SchedulerLimits | None = None,
    stream_limits: StreamLimits | None = None,
    tenants: Tenants | None = None,
    options: Sequence[tuple[str, int]] = SERVER_OPTIONS,
    ready: Callable[[], bool] = lambda: True,
) -> AsyncIterator[LocalTeacher]:
    """A running teacher; it is stopped on leaving, and its streams with it."""
    engine, access = engine or FakeEngine(), Access()
    access.tenants = tenants or access.tenants
    parts = TeacherParts(
        engine,
        info or teacher_info(engine),
        access=access,
        limits=Limits(
            scheduler=scheduler_limits or SchedulerLimits(),
            stream=stream_limits or StreamLimits(),
            evict_idle_s=evict_idle_s,
        ),
        accepts=ready,
    )
    parts.life.enter(Phase.SERVING)
    server = parts.grpc_server(options=options)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield LocalTeacher(
            address=f"127.0.0.1:{bound}",
            info=parts.info,
            parts=parts,
            scheduler=parts.scheduler,
            sessions=parts.sessions,
            service=parts.service,
            metrics=parts.metrics,
            server=server,
        )
    finally:
        await server.stop(None)
