"""Metrics that are read when Prometheus asks: plain counts, and what the server holds just now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from teacher_server.metrics.tallies import MessageTally, TenantTally, TimeTally

_OUTCOMES = ("admitted", "refused", "expired", "cancelled")
_DROPS = {"deadline": "expired", "cancelled": "cancelled"}
MethodLabels = tuple[str, str, str]

OTHER = "other"
"""Label value of everything past a bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What a server holds at one moment. None where nobody knows."""

    active_sessions: int = 0
    """Those with an append waiting or running."""
    queue_depth: int = 0
    queue_tokens: int = 0
    batch_sessions: int = 0
    batch_tokens: int = 0
    send_queue_bytes: int = 0
    engine_silent_seconds: float = 0.0
    kv_used_ratio: float | None = None
    kv_capacity_tokens: float | None = None
    session_tokens: int = 0
    """Prompts and scored tokens of the open sessions."""
    tenant_sessions: Mapping[str, int] = field(default_factory=dict)
    """Open sessions by tenant."""
    phase: str = ""
    phases: tuple[str, ...] = ()


_GAUGES = {
    "queue_depth": "Queries waiting for the engine.",
    "queue_tokens": "New tokens waiting for the engine.",
    "batch_sessions": "Queries in the engine.",
    "batch_tokens": "New tokens in the engine.",
    "send_queue_bytes": "Replies that clients have not accepted yet, bytes.",
    "engine_silent_seconds": "Time that the engine has owed answers and given none.",
    "session_tokens": "Tokens of the open sessions, prompts included.",
    "kv_capacity_tokens": "Tokens that the KV cache holds; absent where the engine does not tell.",
    "kv_used_ratio": "Share of the room for KV that is taken; absent where the engine does not "
    "tell.",
}
"""Fields of Readings that are gauges of their own, teacher_*."""

_TIMES = {
    "teacher_queue_wait_seconds": "Time an append waited for the engine.",
    "teacher_engine_step_seconds": "Time an append spent in the engine.",
}
SHORT_TIMES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SHORT_TIMES_US = tuple(round(seconds * 1e6) for seconds in SHORT_TIMES_S)


class LiveMetrics(Collector):
    """Makes families of tallies and of a reading."""

    def __init__(
        self, tenants: Mapping[str, TenantTally], messages: Mapping[MethodLabels, MessageTally]
    ) -> None:
        self._tenants = tenants
        self._messages = messages
        self._times = {name: TimeTally(_SHORT_TIMES_US) for name in _TIMES}
        self.queue_wait, self.engine_step = self._times.values()
        self.read: Callable[[], Readings] = Readings
        self.limits: Mapping[str, float] = {}
        """What the server may hold, by setting."""
        self.limits_of: Callable[[str], Mapping[str, float]] = lambda tenant: {}
        """What a tenant may have, by setting; no entry for what is not limited."""
        self.open_sessions = 0
        self.slow_streams = 0
        self.computed_tokens = 0

    def collect(self) -> Iterator[Metric]:
        now = self.read()
        yield from self._tenant_families()
        yield from self._limit_families(now)
        yield from self._message_families()
        yield from self._time_families()
        text = "Tokens the model was run on, for the rows that were made."
        yield CounterMetricFamily("teacher_computed_tokens", text, self.computed_tokens)
        text = "Sessions held; the active are among the open."
        states = {"open": self.open_sessions, "active": now.active_sessions}
        yield _labelled(GaugeMetricFamily("teacher_sessions", text, labels=["state"]), states)
        phases = {name: float(name == now.phase) for name in now.phases}
        text = "1 for the phase it is in."
        yield _labelled(GaugeMetricFamily("teacher_phase", text, labels=["phase"]), phases)
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"teacher_{name}", text, getattr(now, name))

    def _tenant_families(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "teacher_tokens_scored", "Response tokens scored.", labels=["tenant"]
        )
        admission = CounterMetricFamily(
            "teacher_admission", "What became of queries.", labels=["outcome", "tenant"]
        )
        dropped = CounterMetricFamily(
            "teacher_dropped", "Queries and streams dropped.", labels=["reason"]
        )
        verdicts = CounterMetricFamily(
            "teacher_verdicts",
            "Appends judged by a drift policy, by verdict.",
            labels=["verdict", "tenant"],
        )
        for tenant, tally in self._tenants.items():
            tokens.add_metric([tenant], tally.tokens_scored)
            verdicts.add_metric(["continue", tenant], tally.continued)
            verdicts.add_metric(["truncate", tenant], tally.truncated)
            for outcome in _OUTCOMES:
                admission.add_metric([outcome, tenant], getattr(tally, outcome))
        for reason, outcome in _DROPS.items():
            count = sum(getattr(tally, outcome) for tally in self._tenants.values())
            dropped.add_metric([reason], count)
        dropped.add_metric(["slow"], self.slow_streams)
        yield from (tokens, admission, dropped, verdicts)

    def _limit_families(self, now: Readings) -> Iterator[Metric]:
        limits = GaugeMetricFamily(
            "teacher_limit", "What the server may hold, by setting.", labels=["setting"]
        )
        yield _labelled(limits, self.limits)
        of_tenants = GaugeMetricFamily(
            "teacher_tenant_limit",
            "What a tenant may have, by setting; absent for what is not limited.",
            labels=["setting", "tenant"],
        )
        sessions = GaugeMetricFamily(
            "teacher_tenant_sessions", "Sessions held, by tenant.", labels=["tenant"]
        )
        counts = Counter(dict.fromkeys(self._tenants, 0))
        for tenant, count in now.tenant_sessions.items():
            counts[tenant if tenant in self._tenants else OTHER] += count
        for tenant in self._tenants:
            sessions.add_metric([tenant], counts[tenant])
            for setting, limit in self.limits_of(tenant).items():
                of_tenants.add_metric([setting, tenant], limit)
        yield from (of_tenants, sessions)

    def _time_families(self) -> Iterator[Metric]:
        for name, tally in self._times.items():
            ends = [*(str(bound / 1e6) for bound in tally.bounds_us), "+Inf"]
            buckets = list(zip(ends, accumulate(tally.counts), strict=True))
            family = HistogramMetricFamily(name, _TIMES[name])
            family.add_metric([], buckets, tally.total_us / 1e6)
            yield family

    def _message_families(self) -> Iterator[Metric]:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        received = CounterMetricFamily(
            "grpc_server_msg_received", "Messages received from clients.", labels=labels
        )
        sent = CounterMetricFamily(
            "grpc_server_msg_sent", "Messages sent to clients.", labels=labels
        )
        for method, tally in self._messages.items():
            received.add_metric(method, tally.received)
            sent.add_metric(method, tally.sent)
        yield from (received, sent)


def _labelled(family: GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
