"""A whole teacher in this process, over a real loopback socket, for tests and client
development."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc

from teacher_server.access.auth import Access
from teacher_server.access.tenants import Tenants
from teacher_server.admission.scheduler import SchedulerLimits
from teacher_server.engine.base import ScoringEngine
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.process.lifecycle import Phase
from teacher_server.process.loading import describe
from teacher_server.process.parts import Limits, TeacherParts
from teacher_server.rpc.server_options import SERVER_OPTIONS
from teacher_server.rpc.stream import StreamLimits
from teacher_server.settings import TeacherConfig
from teacher_wire.records import TeacherInfo
from teacher_wire.vocabulary import Vocabulary


def teacher_info(
    engine: ScoringEngine, *, max_sessions: int = 64, max_append_tokens: int = 4096
) -> TeacherInfo:
    """What a teacher with this engine would tell of itself."""
    config = TeacherConfig(
        engine="fake", max_sessions=max_sessions, max_append_tokens=max_append_tokens
    )
    return describe(config, engine, None)


class LocalTeacher(TeacherParts):
    """The parts of a running teacher, to look into."""

    address: str
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
    vocabulary: Vocabulary | None = None,
) -> AsyncIterator[LocalTeacher]:
    """A running teacher; it is stopped on leaving, and its streams with it."""
    engine, access = engine or FakeEngine(), Access()
    access.tenants = tenants or access.tenants
    teacher = LocalTeacher(
        engine,
        info or teacher_info(engine),
        access=access,
        limits=Limits(
            scheduler=scheduler_limits or SchedulerLimits(),
            stream=stream_limits or StreamLimits(),
            evict_idle_s=evict_idle_s,
        ),
        accepts=ready,
        vocabulary=vocabulary,
    )
    teacher.life.enter(Phase.SERVING)
    teacher.server = teacher.grpc_server(options=options)
    bound = teacher.server.add_insecure_port(f"127.0.0.1:{port}")
    teacher.address = f"127.0.0.1:{bound}"
    await teacher.server.start()
    try:
        yield teacher
    finally:
        await teacher.server.stop(None)
