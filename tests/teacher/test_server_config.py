"""Every setting has a flag, a variable and a key, and a mistake names itself.

Run: pytest tests/teacher/test_server_config.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from teacher_server.cli import main
from teacher_server.flags import GROUPS, add_flags
from teacher_server.process import loading
from teacher_server.settings import (
    ENGINES,
    ConfigError,
    TeacherConfig,
    is_loopback,
    load_config,
    read_by,
    to_toml,
)
from tests.teacher.engine.engine_models import write_tiny_model

OTHER_VALUES: dict[str, Any] = {
    "executor": "ray",
    "engine": "fake",
    "dtype": "float32",
    "head_dtype": "model",
    "device": "cpu",
    "log_level": "debug",
    "log_format": "json",
    "event_loop": "asyncio",
    "host": "127.0.0.2",
    "gpu_memory_utilization": 0.5,
    "analysis_weight": 0.5,
    "cpu_cores": "2,3",
}

NEEDS: dict[str, dict[str, str]] = {
    "tls_cert": {"TEACHER_TLS_KEY": "k"},
    "tls_key": {"TEACHER_TLS_CERT": "c"},
    "tls_client_ca": {"TEACHER_TLS_CERT": "c", "TEACHER_TLS_KEY": "k"},
}
"""Settings that another one needs beside it."""


def other_value(name: str, default: Any) -> Any:
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return "something"
    return default + 1


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def test_every_setting_has_a_flag_a_variable_and_a_key(tmp_path: Path) -> None:
    for name, entry in TeacherConfig.model_fields.items():
        value = other_value(name, entry.default)
        flag, word = f"--{name.replace('_', '-')}", str(value)
        path = tmp_path / "teacher.toml"
        path.write_text(f"{name} = {word.lower() if isinstance(value, bool) else repr(value)}\n")
        if isinstance(value, bool):
            arguments = [flag if value else flag.replace("--", "--no-", 1)]
        else:
            arguments = [flag, word]
        base = {"TEACHER_ENGINE": read_by(entry)[-1], "TEACHER_MODEL": "m"}
        base = {key: base[key] for key in base if key != f"TEACHER_{name.upper()}"}
        base |= NEEDS.get(name, {})
        for flags, env, source in (
            (parse(*arguments), {}, "flag"),
            ({}, {f"TEACHER_{name.upper()}": word}, "environment"),
            ({"config": str(path)}, {}, "file"),
        ):
            config, sources = load_config(flags, base | env)
            assert getattr(config, name) == value
            assert sources[name] == source


def test_flags_win_over_variables_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "teacher.toml"
    path.write_text('engine = "fake"\nmax_k = 1\nmax_sessions = 1\nmax_running = 1\n')
    env = {"TEACHER_CONFIG": str(path), "TEACHER_MAX_K": "2", "TEACHER_MAX_SESSIONS": "2"}
    config, sources = load_config(parse("--max-k", "3"), env)
    assert (config.max_k, config.max_sessions, config.max_running) == (3, 2, 1)
    assert sources["max_k"] == "flag"
    assert sources["drain_s"] == "default"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"grpc_port": 65536}, "grpc_port is 65536, must be at most 65535"),
        ({"max_k": 0}, "max_k is 0, must be at least 1"),
        ({"analysis_weight": 0.0}, "analysis_weight is 0.0, must be more than 0.0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5, must be at most 1.0"),
        ({"drain_s": float("nan")}, "drain_s is nan"),
        ({"engine": "jax"}, "engine is 'jax', must be one of vllm, hf, fake"),
        ({"engine": "hf"}, "model is empty, must name a checkpoint for engine 'hf'"),
        ({"host": "0.0.0.0"}, "host is '0.0.0.0', must be a loopback address: there is no authent"),
        (
            {"host": "0.0.0.0", "tenants_file": "t"},
            "host is '0.0.0.0', must be a loopback address: there is no encryption (tls_cert)",
        ),
        (
            {"host": "0.0.0.0", "tls_cert": "c", "tls_key": "k"},
            "there is no authentication (tenants_file or tls_client_ca)",
        ),
        ({"tls_cert": "c"}, "tls_key is empty, must be given with tls_cert"),
        ({"tls_key": "k"}, "tls_cert is empty, must be given with tls_key"),
        ({"tls_client_ca": "ca"}, "tls_cert is empty, must be given with tls_client_ca"),
        ({"max_k": 0, "grpc_port": -1}, "max_k is 0, must be at least 1; grpc_port is -1, must be"),
        ({"max_sesions": 3}, "unknown setting 'max_sesions', did you mean 'max_sessions'?"),
    ],
)
def test_bad_values_are_named_with_their_limit(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TeacherConfig(**({"engine": "fake"} | values))
    assert text in str(caught.value)


def test_beyond_loopback_only_when_said_so() -> None:
    tls = {"tls_cert": "c", "tls_key": "k"}
    for enough in (
        {"insecure": True},
        {"insecure": True, "tenants_file": "t"},
        {"tenants_file": "t", **tls},
        {"tls_client_ca": "ca", **tls},
    ):
        assert TeacherConfig(engine="fake", host="0.0.0.0", **enough).host == "0.0.0.0"
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "teacher.toml"
    path.write_text("max_sesions = 3\n")
    with pytest.raises(ConfigError, match="'max_sesions', did you mean 'max_sessions'"):
        load_config({"config": str(path)}, {})
    path.write_text("max_k = \n")
    with pytest.raises(ConfigError, match="config file"):
        load_config({"config": str(path)}, {})


def test_foreign_variables_only_warn(caplog: pytest.LogCaptureFixture) -> None:
    env = {"TEACHER_ENGINE": "fake", "TEACHER_PORT": "tcp://10.0.0.1:1", "TEACHER_MAX_SESION": "3"}
    load_config({}, env)
    assert "TEACHER_MAX_SESION is no setting, did you mean 'max_sessions'?" in caplog.text


# What Kubernetes puts into containers beside Services called `teacher-grpc` and `teacher`.
SERVICE_LINKS = {
    "TEACHER_GRPC_PORT": "tcp://10.96.3.7:50051",
    "TEACHER_GRPC_PORT_50051_TCP": "tcp://10.96.3.7:50051",
    "TEACHER_GRPC_PORT_50051_TCP_ADDR": "10.96.3.7",
    "TEACHER_GRPC_PORT_50051_TCP_PORT": "50051",
    "TEACHER_GRPC_PORT_50051_TCP_PROTO": "tcp",
    "TEACHER_GRPC_SERVICE_HOST": "10.96.3.7",
    "TEACHER_GRPC_SERVICE_PORT": "50051",
    "TEACHER_GRPC_SERVICE_PORT_GRPC": "50051",
    "TEACHER_HTTP_PORT": "tcp://[fd00::7]:8080",
    "TEACHER_PORT": "tcp://10.96.3.7:50051",
}


def test_the_service_links_of_kubernetes_are_no_settings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, sources = load_config({"engine": "fake"}, SERVICE_LINKS)
    assert (config.grpc_port, config.http_port) == (50051, 8080)
    assert sources["grpc_port"] == sources["http_port"] == "default"
    (said,) = caplog.messages
    assert said == (
        f"{', '.join(SERVICE_LINKS)}: what Kubernetes says of a Service of that name, no setting, "
        "and not read; enableServiceLinks: false in the pod keeps it away"
    )


def test_a_port_that_is_no_link_is_refused_as_before() -> None:
    with pytest.raises(ConfigError, match="grpc_port is 'fifty', must be of type int"):
        load_config({"engine": "fake"}, {"TEACHER_GRPC_PORT": "fifty"})


@pytest.mark.parametrize(
    ("name", "raw", "kind"),
    [
        ("max_k", "many", "int"),
        ("max_k", 1.5, "int"),
        ("drain_s", True, "float"),
        ("self_test", "maybe", "bool"),
        ("model", 3, "str"),
    ],
)
def test_values_of_another_type_are_refused(name: str, raw: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {raw!r}, must be of type {kind}"):
        load_config({name: raw}, {"TEACHER_ENGINE": "fake"})


def test_printed_settings_load_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["show-config", "--engine", "fake", "--model", 'a "b" \\c', "--no-reflection"])
    assert code == 0
    printed = capsys.readouterr().out
    assert "reflection = false  # flag" in printed
    path = tmp_path / "printed.toml"
    path.write_text(printed)
    config, sources = load_config({"config": str(path)}, {})
    assert config == TeacherConfig(engine="fake", model='a "b" \\c', reflection=False)
    assert tomllib.loads(to_toml(config, sources)) == tomllib.loads(printed)
    assert "\n# block_size = 32  # default, for vllm\n" in printed


def test_a_bad_setting_ends_the_command_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--engine", "fake", "--host", "0.0.0.0"]) == 2
    assert "must be a loopback address" in capsys.readouterr().err


UNREAD = [
    (name, engine)
    for name, entry in TeacherConfig.model_fields.items()
    for engine in ENGINES
    if engine not in read_by(entry)
]


@pytest.mark.parametrize(("name", "engine"), UNREAD)
def test_a_setting_that_the_engine_does_not_read_is_refused_with_the_one_that_does(
    name: str, engine: str
) -> None:
    entry = TeacherConfig.model_fields[name]
    assert TeacherConfig(engine=engine, model="m"), "its default is no choice of anybody's"
    reader = read_by(entry)[0]
    text = f"{name} is .*, which engine '{engine}' does not read: .* engine '{reader}'"
    for value in (entry.default, other_value(name, entry.default)):
        with pytest.raises(ConfigError, match=text):
            TeacherConfig(engine=engine, model="m", **{name: value})


def test_each_engine_is_built_of_the_settings_that_it_is_said_to_read(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "model"))

    class Watched:
        def __init__(self, engine: str) -> None:
            self.config, self.read = TeacherConfig(engine=engine, model=model), set[str]()

        def __getattr__(self, name: str) -> Any:
            self.read.add(name)
            return getattr(self.config, name)

    read: dict[str, set[str]] = {}
    for engine in ENGINES:
        config: Any = Watched(engine)
        loading.build_engine(config)
        read[engine] = config.read
    for name, entry in TeacherConfig.model_fields.items():
        readers = {engine for engine in ENGINES if name in read[engine]}
        if read_by(entry) != ENGINES:
            assert readers == set(read_by(entry)), name
        elif name not in ("model", "revision"):  # with the fake engine its tokenizer's
            assert readers in (set(), set(ENGINES)), name


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint has a password in it") as caught:
        TeacherConfig(engine="fake", otlp_endpoint="http://me:hunter2@collector:4318")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--max-sesions", "3"), "unknown argument '--max-sesions', did you mean '--max-sessions'"),
        (("--max-sessions", "3", "4"), "unknown argument '4'"),
    ],
)
def test_an_unknown_flag_names_the_nearest_and_never_itself(
    words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--engine", "fake", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_misspelt_variable_is_told_on_the_standard_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "teacher_server.cli", "show-config", "--engine", "fake"],
        env=os.environ | {"TEACHER_MAX_CONTXT": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "TEACHER_MAX_CONTXT is no setting, did you mean 'max_context'?" in done.stderr


def test_flags_are_in_groups_each_with_what_it_may_be() -> None:
    parser = argparse.ArgumentParser(prog="serve", add_help=False)
    add_flags(parser)
    text = parser.format_help()
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles == ["options", *GROUPS.values()]
    assert set(GROUPS) <= set(TeacherConfig.model_fields)
    assert "--engine vllm|hf|fake" in text
    assert "--follow-temperature, --no-follow-temperature" in text


@pytest.mark.parametrize("cores", ["", "0-3", "all", "1,", "-1", "0 1"])
def test_cores_are_numbers_with_commas(cores: str) -> None:
    with pytest.raises(ConfigError, match=f"cpu_cores is {cores!r}, must be like '0' or '2,3'"):
        TeacherConfig(model="m", cpu_cores=cores)
