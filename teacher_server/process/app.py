"""One server process from start to end: parts behind ports, an engine loaded, watched, drained.

Health says NOT_SERVING until the engine is up and its self-test has passed, while it is silent, and
from the first SIGTERM on. That signal drains: GoAway to every stream, answers to what was asked,
exit 0. An engine beyond repair ends the process with exit 1.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preflight.network import is_network
from preflight.ports import listener, shown
from teacher_server.access.auth import Access
from teacher_server.admission.scheduler import SchedulerLimits
from teacher_server.engine.base import ScoringEngine
from teacher_server.engine.self_test import self_test
from teacher_server.http.server import http_server
from teacher_server.process import signals
from teacher_server.process.lifecycle import Phase, leave
from teacher_server.process.loading import (
    build_engine,
    describe,
    load_tokenizer,
    pinned_to_commit,
)
from teacher_server.process.parts import Limits, TeacherParts
from teacher_server.process.start_checks import cannot_listen, refuse_early
from teacher_server.process.waiting import saying
from teacher_server.process.watchdog import Watchdog, sample_loop_lag
from teacher_server.rpc.stream import StreamLimits
from teacher_server.settings import ConfigError, TeacherConfig
from teacher_wire.errors import EngineError, TeacherError
from teacher_wire.records import TeacherInfo
from teacher_wire.vocabulary import Vocabulary
from vllm_process.imports import uncollected

if TYPE_CHECKING:
    from teacher_server.http.recordings import RunFolder

log = logging.getLogger(__name__)

_STOP_GRACE_S = 0.5
_LOST_DRAIN_S = 1.0
"""Enough for GoAway: an engine beyond repair answers nothing."""
_ENGINE_CLOSE_S = 10.0
_SETTLE_POLL_S = 0.02
_TEND_INTERVAL_S = 1.0


class StartError(Exception):
    """The server cannot start as configured."""


class HubAwayError(StartError):
    """The checkpoint is on a hub that does not answer: starting it again may help."""


class TeacherApp:
    """One server: what happens to its parts from start to end."""

    def __init__(
        self,
        config: TeacherConfig,
        engine: ScoringEngine,
        info: TeacherInfo,
        tokenizer: Any,
        access: Access,
        runs: RunFolder | None = None,
    ) -> None:
        self._config = config
        self._parts = parts = TeacherParts(
            engine,
            info,
            access=access,
            limits=_limits(config),
            vocabulary=Vocabulary.of(tokenizer) if tokenizer else None,
        )
        self._access, self._life = access, parts.life
        tls = access.tls
        self._grpc = parts.grpc_server(reflects=config.reflection)
        self._http = http_server(
            parts.http_app(
                tokenizer,
                open_metrics=config.open_metrics,
                runs=runs,
                served_name=config.served_model_name,
                follow_temperature=config.follow_temperature,
            ),
            None if tls is None else tls.http_context,
            slow_client_s=config.slow_client_s,
            on_slow=parts.metrics.slow_stream,
        )

    async def run(self) -> int:
        """Serves until a signal or the loss of the engine; returns the exit code.

        Raises StartError. Where something of the engine would not end, the process ends in here.
        Signals before this are teacher_server.process.signals' affair.
        """
        grpc_address = self._bind_grpc()
        http_socket = self._bind_http()
        http_address = shown(self._config.host, http_socket.getsockname()[1])
        self._life.watch_signals()
        if self._access.has_files:
            hang_up = signal.SIGHUP
            asyncio.get_running_loop().add_signal_handler(hang_up, self._refresh_access, True)
        await self._grpc.start()
        http_task = asyncio.create_task(self._http.serve(sockets=[http_socket]))
        http_task.add_done_callback(lambda _: self._life.lose("HTTP has ended"))
        loaded = await self._load()
        if loaded:
            self._life.enter(Phase.SERVING)
            try:
                self._announce(grpc_address, http_address)
            except OSError as error:
                where = error.filename or "standard output"
                self._life.lose(f"{where} cannot be told the addresses: {error.strerror}")
            await self._serve_until_ending()
        await self._drain()
        await self._grpc.stop(_STOP_GRACE_S)
        self._http.should_exit = True
        await asyncio.gather(http_task, return_exceptions=True)
        closed = loaded and await self._close_engine()
        if self._life.why_lost:
            # Said again: what the engine took along has been told since, and the cause comes last.
            log.error("ends with exit code %d: %s", self._life.exit_code, self._life.why_lost)
        if not closed or self._life.why_lost:
            leave(self._life.exit_code)
        signals.ignore()
        return self._life.exit_code

    def _bind_grpc(self) -> str:
        address = shown(self._config.host, self._config.grpc_port)
        tls, port = self._access.tls, 0
        with suppress(RuntimeError):  # it says no more than that it failed to bind
            if tls is None:
                port = self._grpc.add_insecure_port(address)
            else:
                port = self._grpc.add_secure_port(address, tls.grpc_credentials())
        if port == 0:
            raise StartError(
                f"gRPC cannot listen on {address}: is the port in use? Choose another grpc_port"
            )
        return shown(self._config.host, port)

    def _bind_http(self) -> socket.socket:
        host, port = self._config.host, self._config.http_port
        try:
            return listener(host, port)
        except OSError as error:
            raise StartError(cannot_listen("HTTP", "http_port", host, port, error)) from error

    def _refresh_access(self, force: bool = False) -> None:
        """Reads changed files of tenants and TLS; ends streams that are not allowed any more."""
        self._access.poll(force=force)
        self._parts.service.recheck()

    async def _load(self) -> bool:
        """True once the engine may serve; False when a signal came first or it failed."""
        loading = asyncio.create_task(self._start_engine())
        ending = asyncio.create_task(self._life.ending.wait())
        await asyncio.wait({loading, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if self._life.ending.is_set():
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            return False
        try:
            loading.result()
        except TeacherError as error:
            self._life.lose(f"the engine did not start: {error}")
            return False
        return True

    async def _start_engine(self) -> None:
        with saying("loading the engine"):
            await self._parts.engine.start()
        if not self._config.self_test:
            return
        limit_s = self._config.engine_lost_s
        try:
            with saying("testing the engine"):
                async with asyncio.timeout(limit_s):
                    await self_test(self._parts.engine)
        except TimeoutError as error:
            if isinstance(error, TeacherError):
                raise
            raise EngineError(f"its self-test took more than {limit_s} s") from error

    def _announce(self, grpc_address: str, http_address: str) -> None:
        print(f"teacher-server ready grpc={grpc_address} http={http_address}", flush=True)  # noqa: T201
        if self._config.ready_file:
            ready = {"grpc_address": grpc_address, "http_address": http_address, "pid": os.getpid()}
            path = Path(self._config.ready_file)
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(ready) + "\n")
            partial.replace(path)

    async def _serve_until_ending(self) -> None:
        config = self._config
        watchdog = Watchdog(
            self._parts.engine,
            self._life,
            stall_s=config.engine_stall_s,
            lost_s=config.engine_lost_s,
        )
        tasks = [
            asyncio.create_task(watchdog.run()),
            asyncio.create_task(self._tend()),
            asyncio.create_task(sample_loop_lag(self._parts.metrics.loop_lag)),
        ]
        for task in tasks:
            task.add_done_callback(self._on_task_end)
        await self._life.ending.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("a part of the server failed", exc_info=task.exception())
            self._life.lose("a part of the server failed")

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(_TEND_INTERVAL_S)
            self._parts.sessions.expire()
            self._refresh_access()

    async def _drain(self) -> None:
        lost = self._life.phase is Phase.LOST
        reason = "the engine is lost" if lost else "the server is stopping"
        drain_s = min(self._config.drain_s, _LOST_DRAIN_S) if lost else self._config.drain_s
        loop = asyncio.get_running_loop()
        give_up = loop.time() + drain_s
        if not await self._parts.service.drain(reason, drain_s):
            log.warning("streams were still busy after %.1f s and were cut", drain_s)
        while self._http.server_state.tasks and loop.time() < give_up:
            await asyncio.sleep(_SETTLE_POLL_S)

    async def _close_engine(self) -> bool:
        try:
            async with asyncio.timeout(_ENGINE_CLOSE_S):
                await self._parts.engine.close()
        except TimeoutError:
            log.error("the engine did not end within %.0f s", _ENGINE_CLOSE_S)
            return False
        return True


def _limits(config: TeacherConfig) -> Limits:
    return Limits(
        scheduler=SchedulerLimits(
            max_running=config.max_running,
            max_running_tokens=config.max_running_tokens,
            max_queued_tokens=config.max_queued_tokens,
            background_share=config.analysis_weight,
        ),
        stream=StreamLimits(
            max_reply_bytes=config.max_reply_bytes, slow_client_s=config.slow_client_s
        ),
        session_ttl_s=config.session_ttl_s,
        evict_idle_s=config.evict_idle_s,
        resume_window_s=config.resume_window_s,
        kept_rows_bytes=config.kept_rows_mib << 20,
    )


def _runs(config: TeacherConfig) -> RunFolder | None:
    """Raises ConfigError."""
    if not config.runs:
        return None
    from teacher_server.http.recordings import RunFolder  # Arrow comes with it

    return RunFolder(Path(config.runs))


async def serve(config: TeacherConfig) -> int:
    """Builds and runs a server; returns its exit code. Raises StartError and ConfigError."""
    access = Access.from_config(config)
    refuse_early(config)
    runs = _runs(config)
    try:
        with uncollected(), saying("reading the checkpoint's configuration and tokenizer"):
            pinned = await asyncio.to_thread(pinned_to_commit, config)
            engine = await asyncio.to_thread(build_engine, pinned)
            tokenizer = await asyncio.to_thread(load_tokenizer, pinned)
        with saying("taking the digest of the weights"):
            info = await asyncio.to_thread(describe, pinned, engine, tokenizer)
    except ConfigError:
        raise
    except (TeacherError, OSError, ValueError) as error:
        told = " ".join(str(error).split())
        if isinstance(error, PermissionError):
            told += "; let the user that serves read it (chmod a+r)"
        text = f"cannot read the checkpoint {config.model!r}: {told}"
        if is_network(error):
            raise HubAwayError(text) from error
        raise StartError(text) from error
    return await TeacherApp(config, engine, info, tokenizer, access, runs).run()
