"""`teacher-server serve | probe | token | show-config`. Imports only what the command needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_server import logs
from teacher_server.settings import ConfigError, TeacherConfig, add_flags, load_config, to_toml

if TYPE_CHECKING:
    import grpc

EXIT_CONFIG = 2
PROBE_SERVING, PROBE_NOT_SERVING, PROBE_UNREACHABLE = 0, 1, 2


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(
        prog="teacher-server",
        description="Scores a student's tokens while they are being generated.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_flags(commands.add_parser("serve", help="load the teacher and serve it"))
    add_flags(commands.add_parser("show-config", help="print the resolved settings as TOML"))
    probe = commands.add_parser(
        "probe", help="ask for health: exit 0 serving, 1 not serving, 2 unreachable"
    )
    probe.add_argument("--address", default="127.0.0.1:50051", help="gRPC address of the server")
    probe.add_argument("--timeout-s", type=float, default=3.0, help="time to answer")
    probe.add_argument("--tls-ca", help="PEM file of the CA of the server's certificate: use TLS")
    probe.add_argument("--tls-cert", help="PEM file of a client certificate, for mutual TLS")
    probe.add_argument("--tls-key", help="PEM file of its key")
    probe.add_argument("--tls-name", help="name in the server's certificate, when not the address")
    token = commands.add_parser("token", help="make a bearer token; it is printed this once")
    token.add_argument("name", help="name of the tenant")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "probe":
        return _probe(arguments)
    try:
        if arguments.command == "token":
            return _token(arguments.name)
        config, sources = load_config(vars(arguments), os.environ)
    except ConfigError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if arguments.command == "show-config":
        print(to_toml(config, sources), end="")
        return 0
    return _serve(config)


def _serve(config: TeacherConfig) -> int:
    import asyncio

    from teacher_server.process.app import StartError, serve

    logs.configure(config.log_level, config.log_format)
    if config.otlp_endpoint:
        from teacher_wire import tracing

        try:
            tracing.export_to(config.otlp_endpoint, "teacher-server")
        except ImportError as error:
            print(f"teacher-server: otlp_endpoint needs the extra `otel`: {error}", file=sys.stderr)
            return EXIT_CONFIG
    loop_factory = None
    if config.event_loop == "uvloop":
        import uvloop

        loop_factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(serve(config))
    except (StartError, ConfigError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _token(name: str) -> int:
    from teacher_server.access.tenants_file import new_token

    token, lines = new_token(name)
    print(f"# for the trainer, shown this once: its teacher.token_file\n{token}\n")
    print(f"# for the tenants file of the teacher\n{lines}", end="")
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from teacher_wire.codec import SERVICE_NAME

    address = arguments.address
    try:
        channel = _probe_channel(arguments)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return PROBE_UNREACHABLE
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        try:
            status = stub.Check(request, timeout=arguments.timeout_s).status
        except grpc.RpcError as error:
            print(f"{address}: {error.details() or error.code().name}", file=sys.stderr)
            return PROBE_UNREACHABLE
    print(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
    serving = status == health_pb2.HealthCheckResponse.SERVING
    return PROBE_SERVING if serving else PROBE_NOT_SERVING


def _probe_channel(arguments: argparse.Namespace) -> grpc.Channel:
    """A channel as the flags say. Raises OSError for a file that cannot be read."""
    import grpc

    if not arguments.tls_ca:
        return grpc.insecure_channel(arguments.address)
    files = (arguments.tls_ca, arguments.tls_key, arguments.tls_cert)
    pems = [Path(name).read_bytes() if name else None for name in files]
    name = arguments.tls_name
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(
        arguments.address, grpc.ssl_channel_credentials(*pems), options=options
    )


if __name__ == "__main__":
    sys.exit(main())
