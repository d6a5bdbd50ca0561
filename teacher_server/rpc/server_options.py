"""gRPC options of a server. An unknown name is ignored in silence, so each has a test of its
effect."""

from __future__ import annotations

from teacher_wire.codec import CHANNEL_LIMITS

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_LIMITS,
    # Two servers must not share a port in silence.
    ("grpc.so_reuseport", 0),
    # A dead client is found in 50 s at most; clients may ping every 10 s, streams or not.
    ("grpc.keepalive_time_ms", 30_000),
    # Not grpc.keepalive_timeout_ms, which has no effect on a silent peer: docs/LOG.md.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.max_concurrent_streams", 256),
)
