"""Traces across trainer and teacher: a rollout, its appends, and where each spent its time. Off
unless switched on, and opentelemetry is imported only then.

No instrumentation of gRPC: those libraries swallow cancellation and break streams. The trace
travels as `traceparent` in each Append (W3C Trace Context).
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from teacher_wire.records import Timing

_HEADER = "traceparent"
_HEADER_LENGTH = 55
_tracer: Any = None


def export_to(endpoint: str, service: str) -> None:
    """Sends spans to an OTLP/HTTP endpoint, such as http://collector:4318/v1/traces.

    Raises ImportError without the extra `otel`.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    trace_with(provider)


def trace_with(provider: Any) -> None:
    """Makes spans with this TracerProvider; None switches tracing off."""
    global _tracer
    _tracer = None if provider is None else provider.get_tracer("driftline")


def span(name: str, **attributes: str | int) -> AbstractContextManager[Any]:
    """A span around a block, below the one that the task is in."""
    if _tracer is None:
        return nullcontext()
    made: AbstractContextManager[Any] = _tracer.start_as_current_span(name, attributes=attributes)
    return made


def traceparent() -> str:
    """The span that the task is in, for the other side; empty when tracing is off."""
    if _tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(_HEADER, "")


def trace_id_of(header: str) -> str:
    """The trace of a traceparent, 32 hex digits; empty when it is none."""
    trace_id = header[3:35]
    good = len(header) == _HEADER_LENGTH and all(c in "0123456789abcdef" for c in trace_id)
    return trace_id if good else ""


class AppendSpan:
    """The server's span of one append, below the trainer's; costs nothing without one."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def __enter__(self) -> AppendSpan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._span is None:
            return
        if kind is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, kind.__name__)
        self._span.end()

    def scored(self, timing: Timing) -> None:
        """Adds the children: the queue, then the engine, which has just ended."""
        if self._span is None:
            return
        from opentelemetry.trace import set_span_in_context

        end = time.time_ns()
        middle = end - timing.engine_us * 1000
        start = middle - timing.queue_us * 1000
        context = set_span_in_context(self._span)
        for name, begun, ended in (("queue", start, middle), ("engine", middle, end)):
            _tracer.start_span(name, context=context, start_time=begun).end(end_time=ended)


_NO_SPAN = AppendSpan(None)


def append_span(parent: str, num_tokens: int) -> AppendSpan:
    """The span of an append that came with this traceparent; nothing without one."""
    if _tracer is None or not trace_id_of(parent):
        return _NO_SPAN
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({_HEADER: parent})
    attributes = {"tokens": num_tokens}
    return AppendSpan(
        _tracer.start_span(
            "teacher append", context=context, kind=SpanKind.SERVER, attributes=attributes
        )
    )
