"""Prometheus metrics of one server, on a registry of their own. Knows no engine and no transport.

The `grpc_server_*` families keep the names and labels that every gRPC dashboard expects; the rest
is `teacher_*`. Every label is bounded: methods and codes by the contract, error types by the error
table, tenants by order of arrival (the first `max_tenants` by name, later ones as "other").

What happens on every append is a plain count (tallies.py) or is read when Prometheus asks
(live.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from grpc import StatusCode
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from teacher_server.metrics.live import (
    OTHER,
    SHORT_TIMES_S,
    LiveMetrics,
    MethodLabels,
    Readings,
)
from teacher_server.metrics.tallies import MessageTally, TenantTally
from teacher_wire import __version__
from teacher_wire.errors import ERRORS_BY_NAME
from teacher_wire.records import TeacherInfo, Timing

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SERVICE = "opd.teacher.v1.TeacherService"
_GRPC_TYPES = {"GetInfo": "unary", "Score": "server_stream", "Session": "bidi_stream"}
_CODES = frozenset(code.name for code in StatusCode)

_LAG_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
# A session lives as long as a training run, so the last buckets reach hours.
_CALL_BUCKETS_S = (0.005, 0.025, 0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200, 28800)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self, *, max_tenants: int = 32) -> None:
        if max_tenants < 1:
            raise ValueError(f"max_tenants is {max_tenants}, must be at least 1")
        self.registry = CollectorRegistry()
        self._max_tenants = max_tenants
        self._tenants: dict[str, TenantTally] = {}
        self._messages: dict[MethodLabels, MessageTally] = {}
        self._live = LiveMetrics(self._tenants, self._messages)
        self.registry.register(self._live)
        self._add_calls()
        self._add_events()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def _add_calls(self) -> None:
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        method = ("grpc_type", "grpc_service", "grpc_method")
        self._rpcs_started = counter("grpc_server_started", "RPCs started on the server.", method)
        self._rpcs_handled = counter(
            "grpc_server_handled",
            "RPCs completed on the server, whatever their outcome.",
            (*method, "grpc_code"),
        )
        self._rpc_seconds = histogram(
            "grpc_server_handling_seconds",
            "Duration of an RPC; of a whole stream for a stream.",
            method,
            buckets=_CALL_BUCKETS_S,
        )
        self._http_seconds = histogram(
            "teacher_http_request_seconds",
            "Duration of an HTTP request.",
            ("route", "status"),
            buckets=SHORT_TIMES_S,
        )
        self._lag_seconds = histogram(
            "teacher_event_loop_lag_seconds",
            "How late the event loop was, sampled four times a second.",
            buckets=_LAG_BUCKETS_S,
        )

    def _add_events(self) -> None:
        counter = partial(Counter, registry=self.registry)
        self._errors = counter("teacher_errors", "Errors sent to clients.", ("type",))
        self._evictions = counter("teacher_evictions", "Sessions ended unasked.", ("reason",))
        self._resumes = counter("teacher_resumes", "Sessions opened to go on.", ("result",))
        for name in ERRORS_BY_NAME:
            self._errors.labels(name)
        for reason in ("idle", "lost", "room"):
            self._evictions.labels(reason)
        for result in ("held", "rebuilt", "refused"):
            self._resumes.labels(result)
        self._text_rows = counter(
            "teacher_text_rows",
            "Rows of texts scored over HTTP, made or kept from an earlier call.",
            ("source",),
        )
        for source in ("kept", "made"):
            self._text_rows.labels(source)
        self._kept_bytes = Gauge(
            "teacher_kept_rows_bytes", "Rows of texts that are kept.", registry=self.registry
        )
        self._build = Gauge(
            "teacher_build_info",
            "Always 1; the labels say what is served.",
            ("version", "model", "weights", "tokenizer", "engine", "dtype"),
            registry=self.registry,
        )

    def watch(self, read: Callable[[], Readings]) -> None:
        """What the server holds just now is read by `read`, at every scrape."""
        self._live.read = read

    def limited(
        self, limits: Mapping[str, float], limits_of: Callable[[str], Mapping[str, float]]
    ) -> None:
        """What the server may hold, and each tenant, by setting."""
        self._live.limits, self._live.limits_of = limits, limits_of

    def serving(self, info: TeacherInfo) -> None:
        """Publishes what is served as the labels of teacher_build_info."""
        self._build.labels(
            info.server_version or __version__,
            info.model_id,
            info.weights_digest or info.revision,
            info.tokenizer_fingerprint,
            info.engine,
            info.dtype,
        ).set(1)

    def tenant(self, name: str) -> TenantTally:
        """The counts of a tenant; those of all later ones together past the bound."""
        tally = self._tenants.get(name)
        if tally is None:
            label = name if len(self._tenants) < self._max_tenants else OTHER
            tally = self._tenants.setdefault(label, TenantTally())
        return tally

    def messages(self, method: str) -> MessageTally:
        """The counts of a method's messages; method as "/package.Service/Method"."""
        return self._messages.setdefault(_method_labels(method), MessageTally())

    def append_done(self, timing: Timing) -> None:
        """Records where the time of one append went."""
        live = self._live
        live.queue_wait.add(timing.queue_us)
        live.engine_step.add(timing.engine_us)
        live.computed_tokens += timing.computed_tokens or 0

    def text_rows(self, kept: int, made: int, kept_bytes: int) -> None:
        """Records where the rows of a text came from, and how much is kept now."""
        self._text_rows.labels("kept").inc(kept)
        self._text_rows.labels("made").inc(made)
        self._kept_bytes.set(kept_bytes)

    def loop_lag(self, seconds: float) -> None:
        """Records how late the event loop was."""
        self._lag_seconds.observe(seconds)

    def sessions_open(self, n: int) -> None:
        """Sets the number of sessions held now."""
        self._live.open_sessions = n

    def evicted(self, reason: str, n: int = 1) -> None:
        """Counts sessions ended because they were idle ("idle") or in the way ("room")."""
        self._evictions.labels(reason).inc(n)

    def resumed(self, result: str) -> None:
        """Counts a session opened to go on: "held" here still, "rebuilt", or "refused"."""
        self._resumes.labels(result).inc()

    def slow_stream(self) -> None:
        """Counts a stream that was cut because its client did not read."""
        self._live.slow_streams += 1

    def error(self, type_name: str) -> None:
        """Counts one error sent to a client, by the name of its class."""
        self._errors.labels(type_name if type_name in ERRORS_BY_NAME else OTHER).inc()

    def rpc_started(self, method: str) -> None:
        """Counts the start of an RPC; method as "/package.Service/Method"."""
        self._rpcs_started.labels(*_method_labels(method)).inc()

    def rpc(self, method: str, code: str | StatusCode, seconds: float) -> None:
        """Records the end of an RPC; code is a gRPC status or its name ("OK", "NOT_FOUND")."""
        name = code.name if isinstance(code, StatusCode) else code
        labels = _method_labels(method)
        self._rpcs_handled.labels(*labels, name if name in _CODES else "UNKNOWN").inc()
        self._rpc_seconds.labels(*labels).observe(seconds)

    def http(self, route: str, status: int, seconds: float) -> None:
        """Records one HTTP request; route is a path template, never a raw path."""
        self._http_seconds.labels(route, str(status)).observe(seconds)

    def render(self) -> bytes:
        """All families in Prometheus text format 0.0.4."""
        return generate_latest(self.registry)


def _method_labels(method: str) -> MethodLabels:
    """(grpc_type, grpc_service, grpc_method); a method outside the contract is "other"."""
    service, _, name = method.removeprefix("/").partition("/")
    if service != _SERVICE or name not in _GRPC_TYPES:
        return OTHER, OTHER, OTHER
    return _GRPC_TYPES[name], service, name
