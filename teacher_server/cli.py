"""`teacher-server serve | doctor | analyze | probe | token | show-config`. Imports only what the
command needs, and nothing before `serve` can be ended by a signal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

try:
    import teacher_wire
except ModuleNotFoundError:
    sys.exit("teacher-server: the distribution driftline-client is missing; install it again")

from teacher_server.process.signals import interrupts_end_quietly, signals_end_at_once

if TYPE_CHECKING:
    import argparse

    import grpc

    from teacher_server.settings import TeacherConfig

EXIT_FAILED, EXIT_CONFIG, EXIT_INTERRUPTED = 1, 2, 130
PROBE_SERVING, PROBE_NOT_SERVING, PROBE_UNREACHABLE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["doctor"]:
        return _doctor(words)
    with signals_end_at_once() if words[:1] == ["serve"] else interrupts_end_quietly():
        return _run(words)


def _run(words: Sequence[str]) -> int:
    # A probe asks for health every few seconds: it does without the settings, and their imports.
    if words[:1] in (["probe"], ["--version"]):
        return _probe(build_parser(with_settings=False).parse_args(words))
    if words[:1] == ["analyze"]:
        from teacher_server.process.analysis import analyze

        return analyze(build_parser(with_settings=False).parse_args(words))
    from teacher_server.flags import refuse_unknown_flags
    from teacher_server.process.model_folder import check_model_folder
    from teacher_server.settings import ConfigError, load_config, to_toml

    arguments, rest = build_parser().parse_known_args(words)
    try:
        refuse_unknown_flags(rest)
        if arguments.command == "token":
            return _token(arguments.name)
        config, sources = load_config(vars(arguments), os.environ)
        if arguments.command == "serve":
            check_model_folder(config)
    except ConfigError as error:
        return _refused(error)
    if arguments.command == "show-config":
        print(to_toml(config, sources), end="")
        return 0
    return _serve(config)


def build_parser(*, with_settings: bool = True) -> argparse.ArgumentParser:
    """All commands and flags."""
    import argparse

    from teacher_server.process.analysis import add_parser as add_analyze

    parser = argparse.ArgumentParser(
        prog="teacher-server",
        description="Scores a student's tokens while they are being generated.",
    )
    version = teacher_wire.version_line(parser.prog)
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="load the teacher and serve it")
    doctor = commands.add_parser(
        "doctor",
        help="look for what would keep `serve` from starting: exit 0, or 2 where something would",
    )
    doctor.add_argument("--json", action="store_true", help="findings as JSON")
    shown = commands.add_parser("show-config", help="print the resolved settings as TOML")
    if with_settings:
        from teacher_server.flags import add_flags

        add_flags(serve)
        add_flags(shown)
        add_flags(doctor)
    probe = commands.add_parser(
        "probe", help="ask for health: exit 0 serving, 1 not serving, 2 unreachable"
    )
    probe.add_argument("--address", default="127.0.0.1:50051", help="gRPC address of the server")
    probe.add_argument("--timeout-s", type=float, default=3.0, help="time to answer")
    probe.add_argument("--tls-ca", help="PEM file of the CA of the server's certificate: use TLS")
    probe.add_argument("--tls-cert", help="PEM file of a client certificate, for mutual TLS")
    probe.add_argument("--tls-key", help="PEM file of its key")
    probe.add_argument("--tls-name", help="name in the server's certificate, when not the address")
    add_analyze(commands)
    token = commands.add_parser("token", help="make a bearer token; it is printed this once")
    token.add_argument("name", help="name of the tenant")
    return parser


def _doctor(words: Sequence[str]) -> int:
    """Its findings are output: when they end in the middle, that is told, but for a reader (`head`)
    who has seen enough. As `student-trainer doctor` does."""
    try:
        code = _examined(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"teacher-server: standard output: {error.strerror}", file=sys.stderr)
        # Nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return code


def _examined(words: Sequence[str]) -> int:
    from preflight.findings import Finding, problem
    from preflight.showing import told
    from teacher_server.flags import refuse_unknown_flags
    from teacher_server.settings import ConfigError, load_config

    arguments, rest = build_parser().parse_known_args(words)
    found: Iterable[Finding]
    try:
        refuse_unknown_flags(rest)
        config, _ = load_config(vars(arguments), os.environ)
    except ConfigError as error:
        found = [problem("settings", str(error))]
    else:
        from teacher_server.process.doctor import findings

        found = findings(config)
    version = teacher_wire.__version__
    bad = told(found, in_json=arguments.json, program="teacher-server", version=version)
    return EXIT_CONFIG if bad else 0


def _refused(error: Exception) -> int:
    print(f"teacher-server: {error}", file=sys.stderr)
    return EXIT_CONFIG


def _serve(config: TeacherConfig) -> int:
    import asyncio
    import logging

    from teacher_server import logs
    from teacher_wire import __version__

    logs.configure(config.log_level, config.log_format)
    what = (__version__, config.model or "no model", config.engine)
    logging.getLogger(__name__).info("teacher-server %s begins: %s, engine %s", *what)
    from teacher_server.process.app import HubAwayError, StartError, serve
    from teacher_server.process.lifecycle import EXIT_BROKEN, leave
    from teacher_server.settings import ConfigError

    async def until_it_ends() -> int:
        try:
            return await serve(config)
        except (StartError, ConfigError):
            raise
        except Exception as error:  # noqa: BLE001 - nobody foresaw it, and nothing of it may stay
            _tell_unforeseen(error)
            leave(EXIT_BROKEN)

    loop_factory = None
    if config.event_loop == "uvloop":
        import uvloop

        loop_factory = uvloop.new_event_loop
    try:
        if config.otlp_endpoint:
            _send_traces(config.otlp_endpoint)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(until_it_ends())
    except HubAwayError as error:
        _refused(error)
        return EXIT_BROKEN
    except (StartError, ConfigError) as error:
        return _refused(error)


def _send_traces(endpoint: str) -> None:
    from teacher_server.settings import ConfigError
    from teacher_wire import tracing

    try:
        tracing.export_to(endpoint, "teacher-server")
    except ImportError as error:
        raise ConfigError(f"otlp_endpoint needs the extra `otel`: {error}") from error


def _tell_unforeseen(error: Exception) -> None:
    """One line, and a file with the traceback."""
    import tempfile
    import traceback

    told = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="teacher-server-", suffix=".txt", delete=False
        ) as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        print(*traceback.format_exception(error), file=sys.stderr)
    else:
        told += f"; its traceback is in {file.name}, for a bug report"
    print(f"teacher-server: {told}", file=sys.stderr)


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
    from pathlib import Path

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
