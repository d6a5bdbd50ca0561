"""Settings of a teacher server: one frozen record, from flags, environment, a TOML file and
defaults.

Every setting `max_sessions` is the flag `--max-sessions`, the environment variable
`TEACHER_MAX_SESSIONS` and the TOML key `max_sessions`; the first of these that is given wins.
pydantic-settings reads variables and file; flags are argparse's (teacher_server.flags), for a help
text of one line a setting and subcommands that need no settings.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from teacher_server.service_links import without_service_links
from vllm_process.cores import CORES_PATTERN

ENV_PREFIX = "TEACHER_"
log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A setting that cannot be served; the message names it, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class ReadBy:
    """Marks a setting that these engines read and the others do not."""

    engines: tuple[str, ...]


VLLM, HF, FAKE, MODELS = map(ReadBy, (("vllm",), ("hf",), ("fake",), ("vllm", "hf")))
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0.0)]
Patience = Annotated[float, Field(ge=0.1)]


class TeacherConfig(BaseSettings):
    """Everything that can be set. Raises ConfigError."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix=ENV_PREFIX,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    engine: Literal["vllm", "hf", "fake"] = "vllm"
    """what scores"""
    model: str = ""
    """checkpoint: a folder or a hub name; may be empty for fake"""
    revision: str = ""
    """revision of a hub checkpoint"""
    tokenizer: str = ""
    """tokenizer, when it is not the checkpoint's own"""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], MODELS] = "auto"
    """arithmetic of the model"""
    head_dtype: Annotated[Literal["model", "float32"], VLLM] = "float32"
    """logits of the LM head; a quantised head on a GPU needs model"""
    device: Annotated[Literal["auto", "cpu", "cuda"], HF] = "auto"
    """where the model runs"""
    max_context: int = Field(8192, ge=2)
    """prompt plus response, tokens; not set, no more than the model has positions"""
    max_k: int = Field(128, ge=1, le=4096)
    """largest top-k and candidates a row"""
    self_test: bool = True
    """score a short text two ways before serving"""
    block_size: Annotated[Count, VLLM] = 32
    """tokens in a KV block"""
    kv_cache_gib: Annotated[float, Field(ge=0.0), VLLM] = 0.0
    """KV cache of a GPU, or of all processes on a CPU, GiB; 0: 4 on a CPU, what
    gpu_memory_utilization leaves on a GPU"""
    gpu_memory_utilization: Annotated[float, Field(ge=0.01, le=1.0), VLLM] = 0.9
    """share of the GPU's memory; it must be free at the start, whatever kv_cache_gib is"""
    max_num_seqs: Annotated[Count, VLLM] = 256
    """queries in one engine step"""
    max_num_batched_tokens: Annotated[Count, VLLM] = 8192
    """tokens in one engine step"""
    tensor_parallel_size: Annotated[Count, VLLM] = 1
    """GPUs that share each layer of the model; on a CPU processes, each on cores of its own"""
    pipeline_parallel_size: Annotated[Count, VLLM] = 1
    """stages that share the layers; takes that many times as many GPUs"""
    data_parallel_size: Annotated[Count, VLLM] = 1
    """copies of the model that share the sessions; takes that many times as many GPUs"""
    executor: Annotated[Literal["auto", "ray"], VLLM] = "auto"
    """where the engine's processes are: on this host, or with ray on the nodes of the Ray cluster
    that this host is part of"""
    cpu_cores: Annotated[str, Field(pattern=CORES_PATTERN), VLLM] = "auto"
    """cores of the engine on a CPU, such as 0 or 2,3; shared takes all and gives one away while it
    waits, shared:1 is one thread on any of them"""
    enforce_eager: Annotated[bool, VLLM] = False
    """no compiled graphs: starts sooner, runs slower"""
    hf_sessions: Annotated[Count, HF] = 64
    """KV caches that the engine keeps"""
    fake_vocab_size: Annotated[int, Field(ge=2), FAKE] = 512
    """vocabulary of the engine"""
    fake_tokens_per_s: Annotated[float, Field(ge=0.0), FAKE] = 0.0
    """speed of the engine, 0 for no time"""
    fake_latency_s: Annotated[Seconds, FAKE] = 0.0
    """time of a query in the engine, s"""
    fake_step_tokens: Annotated[int, Field(ge=0), FAKE] = 0
    """tokens of a step of the engine, 0: no steps"""
    host: str = "127.0.0.1"
    """address to listen on"""
    grpc_port: Port = 50051
    """port of gRPC, 0 for a free one"""
    http_port: Port = 8080
    """port of HTTP, 0 for a free one"""
    insecure: bool = False
    """listen beyond loopback without authentication or without encryption"""
    tenants_file: str = ""
    """TOML file of tenants and their tokens; empty: no tokens"""
    open_metrics: bool = False
    """serve /metrics without a token"""
    tls_cert: str = ""
    """PEM file of the server's certificate chain; empty: no TLS"""
    tls_key: str = ""
    """PEM file of its private key"""
    tls_client_ca: str = ""
    """PEM file of the CA whose certificates clients must show"""
    reflection: bool = True
    """serve gRPC reflection"""
    runs: str = ""
    """folder of runs whose recorded rollouts are shown over HTTP; empty: none"""
    served_model_name: str = ""
    """name by which other trainers' clients ask for the model; empty: as in model"""
    follow_temperature: bool = False
    """/generate and /inference/v1/generate score at the request's temperature; without it at 1, as
    SGLang and vLLM do"""
    kept_rows_mib: int = Field(256, ge=0)
    """rows of texts scored over HTTP that are kept for texts that go on from them, MiB"""
    max_sessions: Count = 4096
    """open sessions"""
    session_ttl_s: Patience = 600.0
    """idle time after which a session ends, s"""
    evict_idle_s: Seconds = 1.0
    """idle time after which a session may make room for a new one, s"""
    resume_window_s: Seconds = 1.0
    """time that a session outlives its broken stream, s"""
    max_append_tokens: Count = 4096
    """tokens in one append"""
    max_running: Count = 64
    """queries in the engine at once"""
    max_running_tokens: Count = 16_384
    """new tokens in the engine at once"""
    max_queued_tokens: Count = 262_144
    """tokens waiting for the engine"""
    analysis_weight: float = Field(0.1, gt=0.0, le=1.0)
    """weight of analysis over HTTP beside training, as a share of its tenant's"""
    engine_stall_s: Patience = 30.0
    """silence of an engine that owes answers, until health says NOT_SERVING, s"""
    engine_lost_s: Patience = 300.0
    """silence of an engine that owes answers, until the server exits with 1, s"""
    slow_client_s: Patience = 30.0
    """time a client may take to accept a reply, s"""
    max_reply_bytes: int = Field(8 << 20, ge=1 << 20)
    """replies waiting on one stream, bytes"""
    drain_s: Seconds = 30.0
    """time for streams to end after SIGTERM, s"""
    ready_file: str = ""
    """file to write addresses and process id to, as JSON, when ready"""
    log_level: Literal["debug", "info", "warning"] = "info"
    """least severe log line"""
    log_format: Literal["text", "json"] = "text"
    """form of log lines"""
    otlp_endpoint: str = ""
    """OTLP/HTTP address that traces are sent to, empty for none"""
    event_loop: Literal["uvloop", "asyncio"] = "uvloop"
    """event loop"""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            details: list[Any] = error.errors(include_url=False)
            raise ConfigError("; ".join(map(_problem, details))) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """A record holds what it is given; `load_config` asks the sources."""
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and _FIELDS[str(info.field_name)].annotation is not bool:
            raise ConfigError(_wrong_type(str(info.field_name), value))
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TeacherConfig:
        self._refuse_unread()
        if self.engine != "fake" and not self.model:
            raise ConfigError(f"model is empty, must name a checkpoint for engine {self.engine!r}")
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
        if urlsplit(self.otlp_endpoint).password is not None:
            # The value would be printed by show-config, and repeated here.
            raise ConfigError(
                "otlp_endpoint has a password in it, must not: set OTEL_EXPORTER_OTLP_HEADERS"
            )
        if not self.insecure and not is_loopback(self.host):
            self._refuse_open_network()
        return self

    def _refuse_unread(self) -> None:
        for name in sorted(self.model_fields_set):
            readers = read_by(_FIELDS[name])
            if self.engine not in readers:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which engine {self.engine!r} does not "
                    f"read: leave it out, or choose engine {' or '.join(map(repr, readers))}"
                )

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


_FIELDS: Mapping[str, FieldInfo] = TeacherConfig.model_fields


ENGINES: tuple[str, ...] = get_args(_FIELDS["engine"].annotation)


def read_by(entry: FieldInfo) -> tuple[str, ...]:
    """The engines with which a setting is read; all for one of the server itself."""
    return next((mark.engines for mark in entry.metadata if isinstance(mark, ReadBy)), ENGINES)


def _problem(detail: Mapping[str, Any]) -> str:
    """One line: the setting, its value, what is allowed."""
    kind, limits = detail["type"], detail.get("ctx", {})
    if isinstance(limits.get("error"), ConfigError):
        return str(limits["error"])
    name, value = str(detail["loc"][0]), detail["input"]
    if kind == "extra_forbidden":
        return f"unknown setting {name!r}{_nearest(name)}"
    if kind == "greater_than":
        return f"{name} is {value}, must be more than {limits['gt']}"
    if kind == "greater_than_equal":
        return f"{name} is {value}, must be at least {limits['ge']}"
    if kind == "less_than_equal":
        return f"{name} is {value}, must be at most {limits['le']}"
    if kind == "finite_number":
        return f"{name} is {value}, must be a finite number"
    if kind == "literal_error":
        choices = ", ".join(get_args(_FIELDS[name].annotation))
        return f"{name} is {value!r}, must be one of {choices}"
    if kind == "string_pattern_mismatch":
        return f"{name} is {value!r}, must be like '0' or '2,3', or auto or shared"
    return _wrong_type(name, value)


def _wrong_type(name: str, value: object) -> str:
    return f"{name} is {value!r}, must be of type {kind_of(_FIELDS[name])}"


def kind_of(entry: FieldInfo) -> str:
    """int, float, bool or str."""
    return entry.annotation.__name__ if isinstance(entry.annotation, type) else "str"


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key.replace("-", "_").lower(), _FIELDS, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_config(
    flags: Mapping[str, Any], env: Mapping[str, str]
) -> tuple[TeacherConfig, dict[str, str]]:
    """The settings, and for each of them where it came from: flag, environment, file or default.

    `flags` are parsed arguments; names that are no settings are ignored there, and an error in the
    file. Raises ConfigError.
    """
    env = without_service_links(env, ENV_PREFIX)
    path = flags.get("config") or env.get(f"{ENV_PREFIX}CONFIG")
    variables = EnvSettingsSource(TeacherConfig)
    variables.env_vars = {name.lower(): value for name, value in env.items()}
    _warn_of_strangers(env)
    layers: dict[str, Mapping[str, Any]] = {
        "file": _read_file(Path(path)) if path else {},
        "environment": variables(),
        "flag": {name: flags[name] for name in _FIELDS if name in flags},
    }
    values: dict[str, Any] = {}
    sources = dict.fromkeys(_FIELDS, "default")
    for source, layer in layers.items():
        values |= layer
        sources |= dict.fromkeys(layer, source)
    return TeacherConfig(**values), sources


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb"):  # the source takes a file that is not there for an empty one
            values = TomlConfigSettingsSource(TeacherConfig, path).toml_data
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    for key in values:
        if key not in _FIELDS:
            raise ConfigError(f"config file {path}: unknown key {key!r}{_nearest(key)}")
    return values


def _warn_of_strangers(env: Mapping[str, str]) -> None:
    """Only a warning: a container platform may put variables of its own under a service's name."""
    for key in env:
        name = key.removeprefix(ENV_PREFIX).lower()
        if key.startswith(ENV_PREFIX) and name != "config" and name not in _FIELDS:
            log.warning("%s is no setting%s", key, _nearest(name))


def to_toml(config: TeacherConfig, sources: Mapping[str, str]) -> str:
    """The resolved settings as TOML, each with where it came from. Those of other engines are
    comments, as they would be refused."""
    lines = []
    for name, entry in _FIELDS.items():
        value, readers = getattr(config, name), read_by(entry)
        text = str(value).lower() if isinstance(value, bool) else repr(value)
        if isinstance(value, str):
            text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        line = f"{name} = {text}  # {sources[name]}"
        lines.append(line if config.engine in readers else f"# {line}, for {' and '.join(readers)}")
    return "\n".join(lines) + "\n"
