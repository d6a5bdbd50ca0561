"""gRPC options of a server. An unknown name is ignored in silence, so each has a test of its
effect."""

from __future__ import annotations

from teacher_wire.codec import CHANNEL_LIMITS, KEEPALIVE

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_LIMITS,
    *KEEPALIVE,
    # Two servers must not share a port in silence.
    ("grpc.so_reuseport", 0),
    # Clients may ping every 10 s, streams or not.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.max_concurrent_streams", 256),
)
