"""The composition root: the parts of one teacher, joined. The server, tests and benchmarks build
theirs here. Knows no settings, no port and no signal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from fastapi import FastAPI
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from teacher_server.access.auth import Access
from teacher_server.admission.scheduler import Scheduler, SchedulerLimits
from teacher_server.engine.base import ScoringEngine
from teacher_server.http.app import create_app
from teacher_server.http.deps import HttpDeps
from teacher_server.http.texts import Tokenizer
from teacher_server.metrics.live import Readings
from teacher_server.metrics.server import Metrics
from teacher_server.process.lifecycle import Lifecycle, Phase
from teacher_server.process.watchdog import WatchedEngine
from teacher_server.rpc.health import Health
from teacher_server.rpc.interceptors import AccessInterceptor
from teacher_server.rpc.server_options import SERVER_OPTIONS
from teacher_server.rpc.service import TeacherService, add_to_server
from teacher_server.rpc.stream import StreamLimits
from teacher_server.scoring.sessions import SessionTable
from teacher_server.scoring.texts import Texts
from teacher_wire.codec import SERVICE_NAME
from teacher_wire.records import TeacherInfo
from teacher_wire.vocabulary import Vocabulary

if TYPE_CHECKING:
    from teacher_server.http.recordings import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the parts may hold, and for how long; what a session may hold is in TeacherInfo."""

    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    stream: StreamLimits = field(default_factory=StreamLimits)
    session_ttl_s: float = 600.0
    evict_idle_s: float = 1.0
    resume_window_s: float = 1.0
    kept_rows_bytes: int = 256 << 20


def _limits_shown(info: TeacherInfo, limits: Limits) -> dict[str, float]:
    """Those that a gauge can be compared with, by setting."""
    return {
        "max_sessions": info.max_sessions,
        "max_append_tokens": info.max_append_tokens,
        "max_context": info.max_context,
        "max_running": limits.scheduler.max_running,
        "max_running_tokens": limits.scheduler.max_running_tokens,
        "max_queued_tokens": limits.scheduler.max_queued_tokens,
        "max_reply_bytes": limits.stream.max_reply_bytes,
        "kept_rows_bytes": limits.kept_rows_bytes,
    }


class TeacherParts:
    """One teacher around an engine that is not started."""

    def __init__(
        self,
        engine: ScoringEngine,
        info: TeacherInfo,
        *,
        access: Access,
        limits: Limits,
        accepts: Callable[[], bool] | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`accepts` says whether new work is taken over gRPC; None: as the phase has it.
        `vocabulary` is that of `info`, None for a teacher without a tokenizer."""
        self.info = info
        self.access = access
        self.engine = WatchedEngine(engine)
        self.health = Health(("", SERVICE_NAME))
        self.life = Lifecycle(self.health.set)
        self.metrics = Metrics()
        self.scheduler = Scheduler(self.engine, limits.scheduler, tenants=access.tenants)
        self.sessions = SessionTable(
            self.scheduler,
            info,
            metrics=self.metrics,
            tenants=access.tenants,
            ttl_s=limits.session_ttl_s,
            evict_idle_s=limits.evict_idle_s,
            resume_window_s=limits.resume_window_s,
        )
        self.texts = Texts(self.sessions, metrics=self.metrics, max_bytes=limits.kept_rows_bytes)
        self.service = TeacherService(
            info,
            self.sessions,
            metrics=self.metrics,
            ready=accepts or (lambda: self.life.accepts),
            limits=limits.stream,
            tenant_of=access.tenant_of,
            vocabulary=vocabulary or Vocabulary(),
        )
        self.metrics.watch(self._read)
        self.metrics.limited(_limits_shown(info, limits), self._limits_of)

    def grpc_server(
        self, *, options: Sequence[tuple[str, int]] = SERVER_OPTIONS, reflects: bool = True
    ) -> grpc.aio.Server:
        """The service, health and reflection, on no port yet. Needs a running loop."""
        guard = AccessInterceptor(self.access.admit, metrics=self.metrics)
        server = grpc.aio.server(interceptors=[guard], options=list(options))
        add_to_server(self.service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if reflects:
            names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        return server

    def http_app(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        open_metrics: bool = False,
        runs: RunFolder | None = None,
        served_name: str = "",
        follow_temperature: bool = False,
    ) -> FastAPI:
        """The HTTP side of the same sessions."""
        return create_app(
            HttpDeps(
                info=self.info,
                sessions=self.sessions,
                texts=self.texts,
                served_name=served_name,
                follow_temperature=follow_temperature,
                ready=lambda: self.life.ready,
                metrics=self.metrics,
                tokenizer=tokenizer,
                authenticate=self.access.tenant_of if self.access.required else None,
                open_metrics=open_metrics,
                runs=runs,
                sees_runs=lambda tenant: self.access.tenants.get(tenant).runs,
            )
        )

    def _read(self) -> Readings:
        return Readings(
            active_sessions=self.sessions.num_active(),
            queue_depth=self.scheduler.num_queued,
            queue_tokens=self.scheduler.queued_tokens,
            batch_sessions=self.engine.num_running,
            batch_tokens=self.engine.running_tokens,
            send_queue_bytes=self.service.send_queue_bytes,
            engine_silent_seconds=self.engine.silent_s(),
            kv_used_ratio=self.engine.kv_used_ratio(),
            kv_capacity_tokens=self.engine.kv_capacity_tokens(),
            session_tokens=self.sessions.num_tokens(),
            tenant_sessions=self.sessions.by_tenant(),
            phase=self.life.phase.value,
            phases=tuple(phase.value for phase in Phase),
        )

    def _limits_of(self, tenant: str) -> dict[str, float]:
        of = self.access.tenants.get(tenant)
        limits = {
            "max_sessions": of.max_sessions,
            "max_tokens_in_flight": of.max_tokens_in_flight,
            "tokens_per_minute": of.tokens_per_minute,
        }
        return {setting: limit for setting, limit in limits.items() if limit is not None}
