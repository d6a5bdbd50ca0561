"""The composition root: engine, scheduler, sessions, gRPC and HTTP in one process, and its life
cycle.

Health says NOT_SERVING until the engine is up and its self-test has passed, while it stalls, and
from the first SIGTERM on. That signal drains: GoAway to every stream, answers to what was asked,
exit 0. A second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from teacher_server import __version__, http_api
from teacher_server.auth import Access
from teacher_server.config import TeacherConfig
from teacher_server.engine.base import ScoringEngine
from teacher_server.engine.fake_engine import FakeEngine, fake_fingerprint
from teacher_server.engine.self_test import self_test
from teacher_server.http_edge import DEFAULT_TENANT
from teacher_server.http_server import http_server
from teacher_server.interceptors import AccessInterceptor
from teacher_server.metrics import Metrics
from teacher_server.scheduler import Scheduler, SchedulerLimits
from teacher_server.server_options import SERVER_OPTIONS
from teacher_server.service import SERVICE_NAME, TeacherService
from teacher_server.sessions import SessionTable
from teacher_server.stream import StreamLimits
from teacher_wire.errors import TeacherError
from teacher_wire.fingerprint import tokenizer_fingerprint, weights_digest
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import TeacherInfo

log = logging.getLogger(__name__)

EXIT_OK, EXIT_ENGINE = 0, 1
_WATCH_INTERVAL_S = 1.0
_STOP_GRACE_S = 0.5
_SAME_SIGNAL_S = 0.5
"""Wrappers such as timeout(1) deliver one signal twice, to the process and to its group."""


class StartError(Exception):
    """The server cannot start as configured."""


def build_engine(config: TeacherConfig) -> ScoringEngine:
    """The engine of the configuration, not started. Imports no other engine."""
    if config.engine == "fake":
        return FakeEngine(
            vocab_size=config.fake_vocab_size,
            max_context=config.max_context,
            max_k=min(config.max_k, config.fake_vocab_size),
            prefill_tokens_per_s=config.fake_tokens_per_s,
            base_latency_s=config.fake_latency_s,
            step_tokens=config.fake_step_tokens,
        )
    common: dict[str, Any] = {
        "model": config.model,
        "revision": config.revision or None,
        "dtype": config.dtype,
        "max_context": config.max_context,
        "max_k": config.max_k,
    }
    if config.engine == "hf":
        from teacher_server.engine.hf_engine import HfEngine

        return HfEngine(**common, device=config.device, max_sessions=config.hf_sessions)
    from teacher_server.engine.vllm_engine import VllmEngine

    return VllmEngine(
        **common,
        block_size=config.block_size,
        kv_cache_gib=config.kv_cache_gib or None,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        head_dtype=config.head_dtype,
        enforce_eager=config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel_size,
        cpu_cores=config.cpu_cores,
    )


def load_tokenizer(config: TeacherConfig) -> Any:
    """The tokenizer of the checkpoint, or None for a fake engine without one."""
    name = config.tokenizer or config.model
    if not name:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, revision=config.revision or None)


def describe(config: TeacherConfig, engine: ScoringEngine, tokenizer: Any) -> TeacherInfo:
    """What clients are told. Reads every weight file of a local checkpoint for its digest."""
    served = engine.info
    folder = Path(config.model) if config.model else None
    is_local = folder is not None and folder.is_dir()
    if tokenizer is None:
        fingerprint = fake_fingerprint(served.vocab_size)
    else:
        fingerprint = tokenizer_fingerprint(tokenizer)
    return TeacherInfo(
        model_id=config.model or f"fake-{served.vocab_size}",
        revision=config.revision,
        weights_digest=weights_digest(folder) if folder is not None and is_local else "",
        dtype=served.dtype,
        vocab_size=served.vocab_size,
        tokenizer_fingerprint=fingerprint,
        special_token_ids=tuple(sorted(tokenizer.all_special_ids)) if tokenizer else (),
        max_k=served.max_k,
        max_context=served.max_context,
        engine=served.name,
        engine_version=served.version,
        instance_id=uuid.uuid4().hex,
        max_sessions=config.max_sessions,
        max_append_tokens=config.max_append_tokens,
        server_version=__version__,
        block_tokens=served.block_tokens,
    )


@dataclass(slots=True)
class _State:
    """What of the server changes while it runs."""

    loaded: bool = False
    """The engine is up and has passed its self-test."""
    stalled: bool = False
    stopping: bool = False
    engine_lost: bool = False

    @property
    def ready(self) -> bool:
        return self.loaded and not self.stalled and not self.stopping


class TeacherApp:
    """One server: its parts and what happens to them from start to end."""

    def __init__(
        self,
        config: TeacherConfig,
        engine: ScoringEngine,
        info: TeacherInfo,
        tokenizer: Any,
        access: Access,
    ) -> None:
        self._config = config
        self._engine = engine
        self._access = access
        self._state = _State()
        self._stop = asyncio.Event()
        self._signalled_at = 0.0
        metrics = Metrics()
        self._scheduler = Scheduler(
            engine,
            SchedulerLimits(
                max_running=config.max_running,
                max_running_tokens=config.max_running_tokens,
                max_queued_tokens=config.max_queued_tokens,
            ),
            tenants=access.tenants,
        )
        self._sessions = SessionTable(
            self._scheduler,
            info,
            metrics=metrics,
            tenants=access.tenants,
            ttl_s=config.session_ttl_s,
            evict_idle_s=config.evict_idle_s,
            resume_window_s=config.resume_window_s,
        )
        self._service = TeacherService(
            info,
            self._sessions,
            metrics=metrics,
            ready=lambda: self._state.loaded and not self._state.stopping,
            limits=StreamLimits(
                max_reply_bytes=config.max_reply_bytes, slow_client_s=config.slow_client_s
            ),
            caller=self._access.tenant_of,
        )
        deps = http_api.HttpDeps(
            info=info,
            sessions=self._sessions,
            ready=lambda: self._state.ready,
            metrics=metrics,
            tokenizer=tokenizer,
            authenticate=self._http_tenant if self._access.required else None,
            open_metrics=config.open_metrics,
        )
        tls = self._access.tls
        self._http = http_server(http_api.create_app(deps), tls and tls.http_context())
        self._health = health_aio.HealthServicer()
        guard = AccessInterceptor(self._access.admit, metrics=metrics)
        self._grpc = grpc.aio.server(interceptors=[guard], options=SERVER_OPTIONS)
        pb_grpc.add_TeacherServiceServicer_to_server(self._service, self._grpc)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if config.reflection:
            names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._grpc)

    async def run(self) -> int:
        """Serves until a signal or the loss of the engine; returns the exit code."""
        grpc_address = self._bind_grpc()
        http_socket = self._bind_http()
        http_address = _address(self._config.host, http_socket.getsockname()[1])
        await self._publish()
        self._watch_signals()
        await self._grpc.start()
        http_task = asyncio.create_task(self._http.serve(sockets=[http_socket]))
        try:
            if await self._load():
                self._announce(grpc_address, http_address)
                await self._watch()
            await self._drain()
        finally:
            await self._grpc.stop(_STOP_GRACE_S)
            self._http.should_exit = True
            await http_task
            await self._engine.close()
        return EXIT_ENGINE if self._state.engine_lost else EXIT_OK

    def _bind_grpc(self) -> str:
        address = _address(self._config.host, self._config.grpc_port)
        try:
            if self._access.tls is None:
                port = self._grpc.add_insecure_port(address)
            else:
                credentials = self._access.tls.grpc_credentials()
                port = self._grpc.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise StartError(f"gRPC cannot listen on {address}: {error}") from error
        if port == 0:
            raise StartError(f"gRPC cannot listen on {address}: is the port in use?")
        return _address(self._config.host, port)

    def _bind_http(self) -> socket.socket:
        host, port = self._config.host, self._config.http_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            text = f"HTTP cannot listen on {_address(host, port)}: {error.strerror}"
            raise StartError(text) from error
        return listener

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        if self._access.has_files:
            loop.add_signal_handler(signal.SIGHUP, self._refresh_access, True)

    def _http_tenant(self, authorization: Sequence[str], certificate_name: str | None) -> str:
        return self._access.tenant_of(authorization, certificate_name, DEFAULT_TENANT)

    def _refresh_access(self, force: bool = False) -> None:
        """Reads changed files of tenants and TLS; ends streams that are not allowed any more."""
        self._access.poll(force=force)
        self._service.recheck()

    def _on_signal(self, number: int) -> None:
        now = asyncio.get_running_loop().time()
        if self._stop.is_set():
            if now - self._signalled_at < _SAME_SIGNAL_S:
                return
            log.warning("second signal %d: ending at once", number)
            os._exit(128 + number)
        log.info("signal %d: draining", number)
        self._signalled_at = now
        self._stop.set()

    async def _load(self) -> bool:
        """True once the engine serves; False when a signal came first or the engine failed."""
        loading = asyncio.create_task(self._start_engine())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            return False
        try:
            loading.result()
        except TeacherError as error:
            log.error("the engine did not start: %s", error)
            self._state.engine_lost = True
            return False
        self._state.loaded = True
        await self._publish()
        return True

    async def _start_engine(self) -> None:
        await self._engine.start()
        if self._config.self_test:
            await self_test(self._engine)

    def _announce(self, grpc_address: str, http_address: str) -> None:
        print(f"teacher-server ready grpc={grpc_address} http={http_address}", flush=True)  # noqa: T201
        if self._config.ready_file:
            ready = {
                "grpc_address": grpc_address,
                "http_address": http_address,
                "pid": os.getpid(),
            }
            path = Path(self._config.ready_file)
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(ready) + "\n")
            partial.replace(path)

    async def _watch(self) -> None:
        """Publishes health every second until a signal or the loss of the engine."""
        while not self._stop.is_set() and not self._state.engine_lost:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _WATCH_INTERVAL_S)
            self._sessions.expire()
            self._refresh_access()
            age_s = self._scheduler.oldest_running_s()
            stalled = age_s > self._config.engine_stall_s
            if stalled != self._state.stalled:
                log.warning("stalled: %s; the oldest query is %.1f s old", stalled, age_s)
            self._state.stalled = stalled
            if not await self._engine.healthy():
                log.error("the engine is lost")
                self._state.engine_lost = True
            await self._publish()

    async def _publish(self) -> None:
        """Tells health checks and their watchers whether the server is ready."""
        serving = self._state.ready and not self._state.engine_lost
        status = health_pb2.HealthCheckResponse
        value = status.SERVING if serving else status.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, value)

    async def _drain(self) -> None:
        self._state.stopping = True
        await self._health.enter_graceful_shutdown()
        if not await self._service.drain("the server is stopping", self._config.drain_s):
            log.warning("streams were still busy after %.1f s", self._config.drain_s)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def serve(config: TeacherConfig) -> int:
    """Builds and runs a server; returns its exit code. Raises StartError and ConfigError."""
    access = Access.from_config(config)
    try:
        engine = await asyncio.to_thread(build_engine, config)
        tokenizer = await asyncio.to_thread(load_tokenizer, config)
        info = await asyncio.to_thread(describe, config, engine, tokenizer)
    except (TeacherError, OSError) as error:
        raise StartError(f"cannot read the checkpoint {config.model!r}: {error}") from error
    return await TeacherApp(config, engine, info, tokenizer, access).run()
