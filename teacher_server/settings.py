"""Settings of a teacher server: one frozen record, from flags, environment, a TOML file and
defaults.

Every setting `max_sessions` is the flag `--max-sessions`, the environment variable
`TEACHER_MAX_SESSIONS` and the TOML key `max_sessions`; the first of these that is given wins.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import logging
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_process.cores import CORES_PATTERN

ENV_PREFIX = "TEACHER_"
log = logging.getLogger(__name__)
Value = str | int | float | bool


class ConfigError(ValueError):
    """A setting that cannot be served; the message names it, its value and what is allowed."""


def setting(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field with its help text and its range, both ends included."""
    metadata = {"text": text, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Everything that can be set."""

    engine: str = setting("vllm", "what scores", choices=("vllm", "hf", "fake"))
    model: str = setting("", "checkpoint: a folder or a hub name; may be empty for fake")
    revision: str = setting("", "revision of a hub checkpoint")
    tokenizer: str = setting("", "tokenizer, when it is not the checkpoint's own")
    dtype: str = setting(
        "auto", "arithmetic of the model", choices=("auto", "float32", "bfloat16", "float16")
    )
    head_dtype: str = setting("model", "arithmetic of the LM head", choices=("model", "float32"))
    device: str = setting("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    max_context: int = setting(8192, "prompt plus response, tokens", low=2)
    max_k: int = setting(128, "largest top-k and candidates a row", low=1, high=4096)
    block_size: int = setting(32, "tokens in a KV block of vllm", low=1)
    kv_cache_gib: float = setting(0.0, "KV cache, GiB, 0 for the engine's choice", low=0.0)
    gpu_memory_utilization: float = setting(0.9, "share of the GPU's memory", low=0.01, high=1.0)
    max_num_seqs: int = setting(256, "queries in one engine step", low=1)
    max_num_batched_tokens: int = setting(8192, "tokens in one engine step", low=1)
    tensor_parallel_size: int = setting(1, "GPUs that share the model", low=1)
    cpu_cores: str = setting("auto", "cores of the vllm engine on a CPU, such as 0 or 2,3")
    enforce_eager: bool = setting(False, "vllm without compiled graphs: starts sooner, runs slower")
    hf_sessions: int = setting(64, "KV caches that the hf engine keeps", low=1)
    self_test: bool = setting(True, "score a short text two ways before serving")
    fake_vocab_size: int = setting(512, "vocabulary of the fake engine", low=2)
    fake_tokens_per_s: float = setting(0.0, "speed of the fake engine, 0 for no time", low=0.0)
    fake_latency_s: float = setting(0.0, "time of a query in the fake engine, s", low=0.0)
    fake_step_tokens: int = setting(0, "tokens of a step of the fake engine, 0: no steps", low=0)
    host: str = setting("127.0.0.1", "address to listen on")
    grpc_port: int = setting(50051, "port of gRPC, 0 for a free one", low=0, high=65535)
    http_port: int = setting(8080, "port of HTTP, 0 for a free one", low=0, high=65535)
    insecure: bool = setting(
        False, "listen beyond loopback without authentication or without encryption"
    )
    tenants_file: str = setting("", "TOML file of tenants and their tokens; empty: no tokens")
    open_metrics: bool = setting(False, "serve /metrics without a token")
    tls_cert: str = setting("", "PEM file of the server's certificate chain; empty: no TLS")
    tls_key: str = setting("", "PEM file of its private key")
    tls_client_ca: str = setting("", "PEM file of the CA whose certificates clients must show")
    reflection: bool = setting(True, "serve gRPC reflection")
    max_sessions: int = setting(4096, "open sessions", low=1)
    session_ttl_s: float = setting(600.0, "idle time after which a session ends, s", low=0.1)
    evict_idle_s: float = setting(
        1.0, "idle time after which a session may make room for a new one, s", low=0.0
    )
    resume_window_s: float = setting(
        1.0, "time that a session outlives its broken stream, s", low=0.0
    )
    max_append_tokens: int = setting(4096, "tokens in one append", low=1)
    max_running: int = setting(64, "queries in the engine at once", low=1)
    max_running_tokens: int = setting(16_384, "new tokens in the engine at once", low=1)
    max_queued_tokens: int = setting(262_144, "tokens waiting for the engine", low=1)
    engine_stall_s: float = setting(
        30.0, "silence of an engine that owes answers, until health says NOT_SERVING, s", low=0.1
    )
    engine_lost_s: float = setting(
        300.0, "silence of an engine that owes answers, until the server exits with 1, s", low=0.1
    )
    slow_client_s: float = setting(30.0, "time a client may take to accept a reply, s", low=0.1)
    max_reply_bytes: int = setting(8 << 20, "replies waiting on one stream, bytes", low=1 << 20)
    drain_s: float = setting(30.0, "time for streams to end after SIGTERM, s", low=0.0)
    ready_file: str = setting("", "file to write addresses and process id to, as JSON, when ready")
    log_level: str = setting("info", "least severe log line", choices=("debug", "info", "warning"))
    log_format: str = setting("text", "form of log lines", choices=("text", "json"))
    otlp_endpoint: str = setting("", "OTLP/HTTP address that traces are sent to, empty for none")
    event_loop: str = setting("uvloop", "event loop", choices=("uvloop", "asyncio"))

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name), entry.metadata)
        if self.engine != "fake" and not self.model:
            raise ConfigError(f"model is empty, must name a checkpoint for engine {self.engine!r}")
        if not re.fullmatch(CORES_PATTERN, self.cpu_cores):
            raise ConfigError(
                f"cpu_cores is {self.cpu_cores!r}, must be like '0' or '2,3', or auto"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            given, other = ("cert", "key") if self.tls_cert else ("key", "cert")
            raise ConfigError(f"tls_{other} is empty, must be given with tls_{given}")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_cert is empty, must be given with tls_client_ca")
        if self.engine_lost_s <= self.engine_stall_s:
            raise ConfigError(
                f"engine_lost_s is {self.engine_lost_s}, must be more than engine_stall_s, "
                f"which is {self.engine_stall_s}"
            )
        if self.grpc_port and self.grpc_port == self.http_port:
            raise ConfigError(f"http_port is {self.http_port}, which is grpc_port: must differ")
        if not self.insecure and not is_loopback(self.host):
            self._refuse_open_network()

    def _refuse_open_network(self) -> None:
        # A token that crosses a network in the clear is everybody's, so it does not count either.
        if not self.tenants_file and not self.tls_client_ca:
            missing = "authentication (tenants_file or tls_client_ca)"
        elif not self.tls_cert:
            missing = "encryption (tls_cert)"
        else:
            return
        raise ConfigError(
            f"host is {self.host!r}, must be a loopback address: there is no {missing}; "
            "insecure = true listens there all the same"
        )


_FIELDS = {entry.name: entry for entry in fields(TeacherConfig)}


def _check(name: str, value: Value, rule: Mapping[str, Any]) -> None:
    choices, low, high = rule["choices"], rule["low"], rule["high"]
    if choices and value not in choices:
        raise ConfigError(f"{name} is {value!r}, must be one of {', '.join(choices)}")
    if isinstance(value, str):
        return
    if low is not None and not value >= low:
        raise ConfigError(f"{name} is {value}, must be at least {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{name} is {value}, must be at most {high}")


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and one flag a setting; one that is not given is not in the namespace."""
    parser.add_argument("--config", metavar="PATH", help="TOML file with settings")
    for name, entry in _FIELDS.items():
        flag, rule = f"--{name.replace('_', '-')}", entry.metadata
        text = f"{rule['text']} (default {entry.default!r})".replace("%", "%%")
        if entry.type == "bool":
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            parser.add_argument(
                flag, default=argparse.SUPPRESS, help=text, metavar=str(entry.type).upper()
            )


def load_config(
    flags: Mapping[str, Any], env: Mapping[str, str]
) -> tuple[TeacherConfig, dict[str, str]]:
    """The settings, and for each of them where it came from: flag, environment, file or default.

    `flags` are parsed arguments; names that are no settings are ignored there, and an error in the
    file. Raises ConfigError.
    """
    path = flags.get("config") or env.get(f"{ENV_PREFIX}CONFIG")
    layers: list[tuple[str, Mapping[str, Any]]] = [
        ("file", _read_file(Path(path)) if path else {}),
        ("environment", _read_env(env)),
        ("flag", {name: flags[name] for name in _FIELDS if name in flags}),
    ]
    values: dict[str, Value] = {}
    sources = dict.fromkeys(_FIELDS, "default")
    for source, layer in layers:
        for name, raw in layer.items():
            values[name] = _parse(name, raw)
            sources[name] = source
    return TeacherConfig(**values), sources  # type: ignore[arg-type]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            values = tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    for key in values:
        if key not in _FIELDS:
            raise ConfigError(f"config file {path}: unknown key {key!r}{_nearest(key, _FIELDS)}")
    return values


def _read_env(env: Mapping[str, str]) -> dict[str, str]:
    """Settings in the environment. Others with the prefix only warn: a container platform may put
    variables of its own under a service's name."""
    values = {}
    for key, raw in env.items():
        name = key.removeprefix(ENV_PREFIX).lower()
        if not key.startswith(ENV_PREFIX) or name == "config":
            continue
        if name in _FIELDS:
            values[name] = raw
        else:
            log.warning("%s is no setting%s", key, _nearest(name, _FIELDS))
    return values


def _nearest(key: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _parse(name: str, raw: object) -> Value:
    """A value in the type of its setting; text is converted, anything else must fit."""
    kind = str(_FIELDS[name].type)
    try:
        if kind == "bool":
            return _parse_bool(raw)
        if kind == "int" and isinstance(raw, str | int) and not isinstance(raw, bool):
            return int(raw)
        if kind == "float" and isinstance(raw, str | int | float) and not isinstance(raw, bool):
            return float(raw)
        if kind == "str" and isinstance(raw, str):
            return raw
        raise ValueError(raw)
    except ValueError:
        raise ConfigError(f"{name} is {raw!r}, must be of type {kind}") from None


def _parse_bool(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if isinstance(raw, str) and raw.lower() in words:
        return words[raw.lower()]
    raise ValueError(raw)


def to_toml(config: TeacherConfig, sources: Mapping[str, str]) -> str:
    """The resolved settings as TOML, each with where it came from."""
    lines = []
    for name in _FIELDS:
        value = getattr(config, name)
        text = str(value).lower() if isinstance(value, bool) else repr(value)
        if isinstance(value, str):
            text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        lines.append(f"{name} = {text}  # {sources[name]}")
    return "\n".join(lines) + "\n"
