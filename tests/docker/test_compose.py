"""Compose file and Dockerfiles, checked without Docker. Run: pytest tests/docker"""

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from student_trainer import cli as trainer_cli
from student_trainer.assembly.teachers import teacher_access
from student_trainer.settings.config import load_config as load_trainer_config
from teacher_server import cli as teacher_cli
from teacher_server.settings import load_config as load_teacher_config

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT = tomllib.loads((ROOT / "proto" / "pyproject.toml").read_text())
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
TEACHERS = [name for name in SERVICES if name.startswith("teacher")]
TRAINERS = [name for name in SERVICES if name.startswith("trainer")]
NAMES = ["teacher", "trainer"]
TOKENS_TEXT = (ROOT / "docker" / "tokens.yml").read_text()
TOKENS: dict[str, Any] = yaml.safe_load(TOKENS_TEXT)


def interpolated(text: str) -> str:
    """The text as Compose reads it when no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")


def instructions(name: str) -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction of docker/<name>.Dockerfile."""
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword, rest) for keyword, rest in pairs]


def stages(name: str) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, its FROM first; what stands before the first FROM is left."""
    found: list[list[tuple[str, str]]] = []
    for keyword, rest in instructions(name):
        if keyword == "FROM":
            found.append([])
        if found:
            found[-1].append((keyword, rest))
    return found


def arguments(name: str) -> list[str]:
    """The words of a service's command, as its process gets them from Compose and the shell."""
    command = [interpolated(word) for word in SERVICES[name]["command"]]
    if SERVICES[name].get("entrypoint") == ["/bin/sh", "-ec"]:
        (script,) = command
        words = shlex.split(script.replace("$HOSTNAME", "host-1"))
        assert words[0] == "exec", "without exec the shell keeps the signals of `docker stop`"
        return words[1:]
    return ["teacher-server", *command]


@pytest.mark.parametrize("text", [COMPOSE_TEXT, interpolated(COMPOSE_TEXT), TOKENS_TEXT])
def test_the_compose_file_fits_the_specification(text: str) -> None:
    try:
        carrier = metadata.distribution("check-jsonschema")
    except metadata.PackageNotFoundError:
        pytest.skip("the development dependency check-jsonschema carries the schema")
    # Only its data file is read: importing the package would load its command line.
    path = carrier.locate_file("check_jsonschema/builtin_schemas/vendor/compose-spec.json")
    schema = json.loads(Path(str(path)).read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)
    content = yaml.safe_load(text)
    assert [error.message for error in validator(schema).iter_errors(content)] == []
    broken = {**content, "services": {"teacher": {"healthchek": {}}}}
    assert list(validator(schema).iter_errors(broken))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "65532:65532"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert not {"privileged", "cap_add", "pid", "network_mode"} & set(service)
    (tmpfs,) = service["tmpfs"]
    path, options = tmpfs.split(":")
    assert path == "/tmp"
    assert {"exec", "mode=1777"} <= set(options.split(","))
    for volume in service["volumes"]:
        assert not volume.startswith(".") or volume.endswith(":ro")


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_can_be_scaled(name: str) -> None:
    service = SERVICES[name]
    assert not {"container_name", "hostname", "ports"} & set(service)
    assert "$$HOSTNAME" in " ".join(service["command"])
    assert "run.out=/runs/host-1" in arguments(name)
    assert "runs:/runs" in service["volumes"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_has_one_teacher_that_its_trainers_wait_for(profile: str) -> None:
    teachers = [name for name in TEACHERS if SERVICES[name]["profiles"] == [profile]]
    trainers = [name for name in TRAINERS if SERVICES[name]["profiles"] == [profile]]
    assert len(teachers) == len(trainers) == 1
    needed = SERVICES[trainers[0]]["depends_on"]
    assert needed == {teachers[0]: {"condition": "service_healthy"}}
    assert SERVICES[teachers[0]]["networks"]["default"]["aliases"] == ["teacher"]


def test_ports_are_published_on_loopback_alone() -> None:
    for name in TEACHERS:
        for port in SERVICES[name]["ports"]:
            assert interpolated(port) == "127.0.0.1:8080:8080"


def test_gpu_services_reserve_a_device_and_cpu_services_none() -> None:
    for service in SERVICES.values():
        if service["profiles"] == ["cpu"]:
            assert "deploy" not in service
            continue
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert ("count" in device) != ("device_ids" in device)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_command_is_a_configuration_the_server_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    script, *words = arguments(name)
    assert script in PYPROJECT["project"]["scripts"]
    parsed = teacher_cli.build_parser().parse_args(words)
    config, _ = load_teacher_config(vars(parsed), {})
    assert (config.engine, config.host, config.insecure) == ("vllm", "0.0.0.0", True)
    assert (config.grpc_port, config.http_port) == (50051, 8080)
    grace = SERVICES[name]["stop_grace_period"]
    assert grace.endswith("s")
    assert float(grace.removesuffix("s")) > config.drain_s


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_command_is_a_configuration_the_trainer_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    script, *words = arguments(name)
    assert script in PYPROJECT["project"]["scripts"]
    parsed = trainer_cli._parser().parse_args(words)
    config = load_trainer_config(parsed.config, parsed.set)
    assert config.teacher.endpoints == ("teacher:50051",)
    assert config.run.out == Path("/runs/host-1")


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_built_from_files_and_arguments_that_exist(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (ROOT / build["dockerfile"]).is_file()
    dockerfile = Path(build["dockerfile"]).stem
    declared = {
        rest.split("=")[0] for keyword, rest in instructions(dockerfile) if keyword == "ARG"
    }
    assert set(build["args"]) <= declared
    extra = build["args"]["EXTRA"]
    assert extra in PYPROJECT["project"]["optional-dependencies"]
    assert (
        SERVICES[name]["image"] == f"driftline-{dockerfile}:{'cuda' if extra == 'cuda' else 'cpu'}"
    )
    assert (build["args"]["TORCH_INDEX"] == "") == (extra == "cuda")


def probe_words(command: str) -> list[str]:
    """The words of a health check, which must not let exit code 2 through."""
    check, fallback = command.split(" || ")
    assert fallback == "exit 1"
    return shlex.split(check)


def test_health_is_the_probe_of_the_served_port() -> None:
    (rest,) = [rest for keyword, rest in instructions("teacher") if keyword == "HEALTHCHECK"]
    options, command = rest.split("CMD ", 1)
    checks = [probe_words(command)]
    for name in TEACHERS:
        kind, text = SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        checks.append(probe_words(text))
        for key in ("interval", "timeout", "retries", "start_period", "start_interval"):
            flag = f"--{key.replace('_', '-')}={SERVICES[name]['healthcheck'][key]}"
            assert flag in options.split()
    for script, *words in checks:
        assert script == "teacher-server"
        parsed = teacher_cli.build_parser().parse_args(words)
        assert (parsed.command, parsed.address) == ("probe", "127.0.0.1:50051")
    exits = (teacher_cli.PROBE_SERVING, teacher_cli.PROBE_NOT_SERVING)
    assert exits == (0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_runs_as_the_user_that_compose_names(name: str) -> None:
    last = stages(name)[-1]
    users = [rest for keyword, rest in last if keyword == "USER"]
    assert users == ["65532:65532"]
    after = [keyword for keyword, _ in last[[k for k, _ in last].index("USER") :]]
    assert "RUN" not in after
    assert "COPY" not in after


@pytest.mark.parametrize("name", NAMES)
def test_an_image_starts_a_console_script(name: str) -> None:
    last = dict(stages(name)[-1])
    (script,) = json.loads(last["ENTRYPOINT"])
    assert script in PYPROJECT["project"]["scripts"]
    assert json.loads(last["CMD"]) == (["serve"] if name == "teacher" else ["--help"])


def is_sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets a top-level entry into the build context."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.lstrip("!")):
            sent = pattern.startswith("!")
    return sent


@pytest.mark.parametrize("name", NAMES)
def test_everything_copied_exists_and_is_sent_to_docker(name: str) -> None:
    copies = [shlex.split(rest) for keyword, rest in instructions(name) if keyword == "COPY"]
    assert copies
    for words in copies:
        if words[0].startswith("--from="):
            assert words[0] == "--from=build"
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists(), source
            assert is_sent_to_docker(source.split("/")[0]), source
    assert not is_sent_to_docker(".git")
    assert not is_sent_to_docker("examples")


@pytest.mark.parametrize("name", NAMES)
def test_every_package_is_copied_before_it_is_installed(name: str) -> None:
    copied = {
        source.rstrip("/")
        for keyword, rest in instructions(name)
        if keyword == "COPY" and not rest.startswith("--")
        for source in shlex.split(rest)[:-1]
    }
    folders = PYPROJECT["tool"]["setuptools"]["package-dir"]
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        top = package.split(".")[0]
        assert folders.get(top, top).split("/")[0] in copied
    for project in (PYPROJECT, CLIENT):
        for file in (project["project"]["readme"], *project["project"]["license-files"]):
            assert file in copied, "a wheel without its licence or its page"


def commands(name: str) -> list[str]:
    """What the RUN instructions of the build stage have the shell do."""
    return [rest for keyword, rest in stages(name)[0] if keyword == "RUN"]


@pytest.mark.parametrize("name", NAMES)
def test_pip_installs_both_distributions_and_only_what_is_there(name: str) -> None:
    words = [shlex.split(command) for command in commands(name) if "pip install" in command]
    paths = {word for line in words for word in line if re.match(r"\.{1,2}(/|$)", word)}
    assert paths == {".", "./proto"}
    for path in paths:
        assert (ROOT / path / "pyproject.toml").is_file()
    (files,) = {line[line.index("-r") + 1] for line in words if "-r" in line}
    assert any(command.endswith(f"> {files}") for command in commands(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_the_requirements_are_those_of_both_distributions(
    name: str, extra: str, tmp_path: Path
) -> None:
    (command,) = [c for c in commands(name) if c.endswith("> requirements.txt")]
    for file in ("pyproject.toml", "proto/pyproject.toml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    shell = ["bash", "-c", command.replace("python -c", f"{sys.executable} -c", 1)]
    subprocess.run(shell, cwd=tmp_path, env={**os.environ, "EXTRA": extra}, check=True)
    found = (tmp_path / "requirements.txt").read_text().splitlines()
    ours, client = PYPROJECT["project"], CLIENT["project"]
    expected = ours["dependencies"] + client["dependencies"] + ours["optional-dependencies"][extra]
    assert found == [line for line in expected if not line.startswith("driftline-client")]
    assert len(found) == len(expected) - 1


def test_both_images_are_built_alike() -> None:
    assert stages("teacher")[0] == stages("trainer")[0]


@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_the_extras_and_torch_are_pinned_exactly(extra: str) -> None:
    project = PYPROJECT["project"]
    (vllm,) = project["optional-dependencies"][extra]
    (torch,) = [line for line in project["dependencies"] if line.startswith("torch")]
    assert "==" in vllm
    assert re.fullmatch(r"torch==[\d.]+", torch), "the Dockerfiles look for this line"


def test_bind_mounts_exist() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_dir()
            else:
                assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_tokens_are_secrets_that_the_programs_look_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = TOKENS["services"][name]
    (secret,) = service["secrets"]
    ((variable, path),) = service["environment"].items()
    assert path == f"/run/secrets/{secret}"
    assert interpolated(TOKENS["secrets"][secret]["file"]).startswith("./secrets/")
    if name in TEACHERS:
        config, _ = load_teacher_config({"engine": "fake"}, {variable: path})
        assert config.tenants_file == path
    else:
        (tmp_path / "token").write_text("abc")
        monkeypatch.setenv(variable, str(tmp_path / "token"))
        words = arguments(name)[1:]
        parsed = trainer_cli._parser().parse_args(words)
        config_of_trainer = load_trainer_config(ROOT / parsed.config, parsed.set)
        assert teacher_access(config_of_trainer.teacher).metadata() == (
            ("authorization", "Bearer abc"),
        )


def test_secrets_are_neither_committed_nor_sent_to_docker() -> None:
    assert set(TOKENS["services"]) == set(SERVICES)
    assert "secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    assert not is_sent_to_docker("secrets")
