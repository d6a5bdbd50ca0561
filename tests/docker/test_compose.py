"""The Compose file and its overlays, checked without Docker. Run: pytest tests/docker"""

import json
import re
import shlex
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import yaml

from student_trainer import cli as trainer_cli
from student_trainer.assembly.teachers import teacher_access
from student_trainer.settings.config import load_config as load_trainer_config
from teacher_server import cli as teacher_cli
from teacher_server.settings import ConfigError
from teacher_server.settings import load_config as load_teacher_config
from tests.docker.compose_files import (
    COMPOSE,
    COMPOSE_TEXT,
    OVERLAYS,
    PYPROJECT,
    ROOT,
    SERVICES,
    TEACHERS,
    TRAINERS,
    VARIABLE,
    arguments,
    interpolated,
    overlay,
)

TOKENS, TLS, TRAINER_HOST = map(overlay, OVERLAYS)
ENDPOINTS = {"TEACHER_ENDPOINTS": '["teacher.example:50051"]'}
TEXTS = [COMPOSE_TEXT, *(path.read_text() for path in OVERLAYS.values())]
BYTES = {"k": 10, "m": 20, "g": 30}


def num_bytes(text: str) -> int:
    """Of a size as Compose writes it."""
    return int(text[:-1]) << BYTES[text[-1]]


def seconds(text: str) -> float:
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


@pytest.mark.parametrize("text", [*TEXTS, *(interpolated(text, **ENDPOINTS) for text in TEXTS)])
def test_the_compose_files_fit_the_specification(text: str) -> None:
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
    assert service["pids_limit"] == 4096
    assert num_bytes(interpolated(service["mem_limit"])) >= num_bytes("8g")
    assert not {"privileged", "cap_add", "pid", "network_mode"} & set(service)
    (tmpfs,) = service["tmpfs"]
    path, options = tmpfs.split(":")
    assert path == "/tmp"
    assert {"exec", "mode=1777"} <= set(options.split(","))
    for volume in service["volumes"]:
        if isinstance(volume, dict):
            assert volume["read_only"] is True
            assert volume["bind"] == {"create_host_path": False}
        else:
            assert not volume.startswith(".") or volume.endswith(":ro")


@pytest.mark.parametrize("name", TEACHERS + TRAINERS)
def test_shared_memory_is_a_variable_within_the_memory(name: str) -> None:
    kind = name.split("-")[0].upper()
    shared, memory = SERVICES[name]["shm_size"], SERVICES[name]["mem_limit"]
    assert num_bytes(interpolated(shared)) < num_bytes(interpolated(memory))
    assert interpolated(shared, **{f"{kind}_SHM_SIZE": "3g"}) == "3g"
    assert interpolated(memory, **{f"{kind}_MEMORY": "9g"}) == "9g"


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_can_be_scaled_and_goes_on_where_it_was(name: str) -> None:
    service = SERVICES[name]
    assert not {"container_name", "hostname", "ports"} & set(service)
    assert service["entrypoint"] == ["numbered-run"]
    assert interpolated(service["environment"]["RUN_NAME"], RUN_NAME="") in ("demo", "first")
    assert interpolated(service["environment"]["RUN_NAME"], RUN_NAME="x") == "x"
    assert "runs:/runs" in service["volumes"]
    assert seconds(service["stop_grace_period"]) >= 60


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_that_cannot_start_is_not_restarted_for_ever(name: str) -> None:
    assert re.fullmatch(r"on-failure:\d", SERVICES[name]["restart"])


@pytest.mark.parametrize(("profile", "teachers"), [("cpu", 1), ("replicas", 2), ("gpu", 1)])
def test_a_profile_has_teachers_that_its_trainers_wait_for_and_ask(
    profile: str, teachers: int
) -> None:
    inside = [name for name in TEACHERS if profile in SERVICES[name]["profiles"]]
    (trainer,) = [name for name in TRAINERS if profile in SERVICES[name]["profiles"]]
    assert len(inside) == teachers
    needed = SERVICES[trainer]["depends_on"]
    assert needed == {name: {"condition": "service_healthy"} for name in inside}
    names = [name if name == "teacher-b" else "teacher" for name in inside]
    assert endpoints(trainer) == tuple(f"{name}:50051" for name in names)
    for name, known in zip(inside, names, strict=True):
        wire = SERVICES[name]["networks"]["wire"]
        assert known in (name, *wire.get("aliases", ()))
    # gRPC, and what is scraped, has a network without a way out.
    assert COMPOSE["networks"]["wire"] == {"internal": True}
    assert "wire" in SERVICES[trainer]["networks"]
    assert ("outside" in SERVICES[trainer]["networks"]) == (profile == "gpu")


def endpoints(name: str, **values: str) -> tuple[str, ...]:
    """What the trainer of a service asks, as its own settings read it."""
    parsed = trainer_cli._parser().parse_args(arguments(name, **values)[1:])
    return load_trainer_config(ROOT / parsed.config, parsed.set).teacher.endpoints


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_asks_the_teachers_that_a_variable_names(name: str) -> None:
    assert endpoints(name, TEACHER_ENDPOINTS='["a:1", "b:2"]') == ("a:1", "b:2")


def test_prometheus_is_put_on_the_networks_that_there_are() -> None:
    """Included beside docker/observability.yml: a network declared otherwise is a conflict."""
    content = yaml.safe_load((ROOT / "docker" / "observability-networks.yml").read_text())
    assert content["networks"] == COMPOSE["networks"]
    assert content["services"]["prometheus"]["networks"] == ["wire", "outside"]
    for name in TRAINERS:
        assert SERVICES[name]["networks"]["wire"] == {"aliases": ["trainers"]}
        assert SERVICES[name]["environment"]["METRICS_PORT"] == "9400"
    files = ["docker/observability.yml", "docker/observability-networks.yml"]
    assert COMPOSE["include"] == [{"path": files, "project_directory": "."}]


def test_ports_are_published_on_loopback_alone() -> None:
    published = {name: SERVICES[name]["ports"] for name in TEACHERS}
    assert {interpolated(port) for ports in published.values() for port in ports} == {
        "127.0.0.1:8080:8080",
        "127.0.0.1:8081:8080",
    }
    # gRPC leaves the project with TLS alone.
    for service in TLS["services"].values():
        for port in service.get("ports", []):
            assert interpolated(port) == "127.0.0.1:50051:50051"
            assert interpolated(port, TEACHER_BIND="0.0.0.0") == "0.0.0.0:50051:50051"


@pytest.mark.parametrize(
    ("name", "variable"), [("teacher", "TEACHER_GPUS"), ("trainer", "TRAINER_GPUS")]
)
def test_gpu_services_reserve_gpus_and_see_a_list_of_them(name: str, variable: str) -> None:
    assert "deploy" not in SERVICES[name]
    service = SERVICES[f"{name}-gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])
    visible = service["environment"]["CUDA_VISIBLE_DEVICES"]
    assert interpolated(visible) == {"teacher": "0", "trainer": "1"}[name]
    assert interpolated(visible, **{variable: "0,1"}) == "0,1"


def test_the_defaults_of_the_gpu_profile_work_together() -> None:
    """Of one family, within each other's context, with the data where the configuration looks."""
    teacher = teacher_cli.build_parser().parse_args(arguments("teacher-gpu")[1:])
    parsed = trainer_cli._parser().parse_args(arguments("trainer-gpu")[1:])
    trainer = load_trainer_config(ROOT / parsed.config, parsed.set)
    assert teacher.model == "Qwen/Qwen3-4B"
    assert trainer.student.model == "Qwen/Qwen3-0.6B"
    assert int(teacher.max_context) >= trainer.rollout.max_context
    assert trainer.data.train == "data/dapo-math-17k.jsonl" or str(trainer.data.train).startswith(
        "data/"
    )
    (data,) = [v for v in SERVICES["trainer-gpu"]["volumes"] if isinstance(v, dict)]
    assert (data["target"], interpolated(data["source"])) == ("/data", "./data")
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert "ln -s /data /app/data" in dockerfile
    for name in ("teacher-gpu", "trainer-gpu", "download"):
        assert SERVICES[name]["environment"]["HF_HOME"] == "/models"
        # Null: as the host has it, or not at all.
        assert SERVICES[name]["environment"]["HF_TOKEN"] is None
        assert "models:/models" in SERVICES[name]["volumes"]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_command_is_a_configuration_the_server_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    script, *words = arguments(name)
    assert script in PYPROJECT["project"]["scripts"]
    parsed = teacher_cli.build_parser().parse_args(words)
    environment = {k: v for k, v in SERVICES[name]["environment"].items() if v is not None}
    config, _ = load_teacher_config(vars(parsed), environment)
    assert (config.engine, config.host, config.insecure) == ("vllm", "0.0.0.0", True)
    assert (config.grpc_port, config.http_port) == (50051, 8080)
    assert seconds(SERVICES[name]["stop_grace_period"]) > config.drain_s


def test_the_engine_of_a_gpu_teacher_is_set_by_variables() -> None:
    values = {
        "TEACHER_MODEL": "org/model",
        "TEACHER_MAX_MODEL_LEN": "18432",
        "TEACHER_TENSOR_PARALLEL_SIZE": "2",
        "TEACHER_PIPELINE_PARALLEL_SIZE": "3",
        "TEACHER_DATA_PARALLEL_SIZE": "4",
        "TEACHER_GPU_MEMORY_UTILIZATION": "0.35",
    }
    parsed = teacher_cli.build_parser().parse_args(arguments("teacher-gpu", **values)[1:])
    config, _ = load_teacher_config(vars(parsed), {"TEACHER_INSECURE": "true"})
    assert (config.model, config.max_context) == ("org/model", 18432)
    sizes = (config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size)
    assert sizes == (2, 3, 4)
    assert config.gpu_memory_utilization == 0.35


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_command_is_a_configuration_the_trainer_takes(name: str) -> None:
    script, *words = arguments(name)
    assert script in PYPROJECT["project"]["scripts"]
    parsed = trainer_cli._parser().parse_args(words)
    config = load_trainer_config(ROOT / parsed.config, parsed.set)
    assert config.run.out == Path("/runs/demo-1")
    assert parsed.resume == "auto"


def probe_words(command: str) -> list[str]:
    """The words of a health check, which must not let exit code 2 through."""
    check, fallback = command.split(" || ")
    assert fallback == "exit 1"
    return shlex.split(check)


@pytest.mark.parametrize("name", TEACHERS)
def test_health_is_the_probe_of_the_served_port(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    # start_interval would need Engine 25, and is refused by buildah 1.28.
    assert set(check) == {"test", "interval", "timeout", "retries", "start_period"}
    # A large checkpoint may be downloaded in it: 16 GB at 3 MB/s.
    assert seconds(check["start_period"]) >= 16e9 / 3e6
    kind, text = check["test"]
    assert kind == "CMD-SHELL"
    script, *words = probe_words(text)
    assert script == "teacher-server"
    parsed = teacher_cli.build_parser().parse_args(words)
    assert (parsed.command, parsed.address, parsed.tls_ca) == ("probe", "127.0.0.1:50051", None)
    exits = (teacher_cli.PROBE_SERVING, teacher_cli.PROBE_NOT_SERVING)
    assert exits == (0, 1)


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_built_from_targets_and_arguments_that_exist(name: str) -> None:
    build = SERVICES[name]["build"]
    dockerfile = (ROOT / build["dockerfile"]).read_text()
    assert set(build["args"]) <= set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    assert f"AS {build['target']}\n" in dockerfile
    extra = build["args"]["EXTRA"]
    assert extra in PYPROJECT["project"]["optional-dependencies"]
    assert SERVICES[name]["image"] == f"driftline-{build['target']}:{extra}"
    index = build["args"]["TORCH_INDEX"]
    assert interpolated(index, TORCH_INDEX="") == "", "an empty index is one"
    assert (interpolated(index) == "") == (extra == "cuda")


def test_bind_mounts_exist() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            if isinstance(volume, dict):
                continue
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_dir()
            else:
                assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", TEACHERS + TRAINERS)
def test_tokens_are_secrets_that_the_programs_look_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = TOKENS["services"][name]
    (secret,) = service["secrets"]
    ((variable, path),) = (pair for pair in service["environment"].items() if "FILE" in pair[0])
    assert path == f"/run/secrets/{secret}"
    assert interpolated(TOKENS["secrets"][secret]["file"]).startswith("./secrets/")
    if name in TEACHERS:
        config, _ = load_teacher_config({"engine": "fake"}, {variable: path})
        assert config.tenants_file == path
    else:
        (tmp_path / "token").write_text("abc")
        monkeypatch.setenv(variable, str(tmp_path / "token"))
        parsed = trainer_cli._parser().parse_args(arguments(name)[1:])
        config_of_trainer = load_trainer_config(ROOT / parsed.config, parsed.set)
        assert teacher_access(config_of_trainer.teacher).metadata() == (
            ("authorization", "Bearer abc"),
        )


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize(
    ("values", "open_metrics"),
    [
        ({}, False),
        ({"TEACHER_OPEN_METRICS": ""}, False),
        ({"TEACHER_OPEN_METRICS": "true"}, True),
    ],
)
def test_with_tokens_a_variable_opens_the_metrics(
    name: str, values: dict[str, str], open_metrics: bool
) -> None:
    given = TOKENS["services"][name]["environment"]
    environment = {key: interpolated(value, **values) for key, value in given.items()}
    config, _ = load_teacher_config({"engine": "fake"}, environment)
    assert config.open_metrics is open_metrics


def test_with_tls_prometheus_has_the_authority_and_the_file_that_names_it() -> None:
    """In the place of the one it has: Compose merges mounts by their place in the container."""
    own = yaml.safe_load((ROOT / "docker" / "observability.yml").read_text())
    place = "/etc/prometheus/prometheus.yml"
    (mount,) = TLS["services"]["prometheus"]["volumes"]
    assert mount == f"./docker/observability/prometheus-tls.yml:{place}:ro"
    assert (
        f"./docker/observability/prometheus.yml:{place}:ro"
        in (own["services"]["prometheus"]["volumes"])
    )
    assert (ROOT / mount.split(":")[0]).is_file()
    (secret,) = TLS["services"]["prometheus"]["secrets"]
    jobs = yaml.safe_load((ROOT / mount.split(":")[0]).read_text())["scrape_configs"]
    assert jobs[0]["tls_config"]["ca_file"] == f"/run/secrets/{secret}"
    assert secret in TLS["secrets"]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_with_tls_is_probed_with_it_and_must_have_tokens(name: str) -> None:
    service = TLS["services"][name]
    (_, text) = service["healthcheck"]["test"]
    _, *words = probe_words(interpolated(text))
    parsed = teacher_cli.build_parser().parse_args(words)
    assert parsed.tls_ca == "/run/secrets/teacher-ca.pem"
    assert parsed.tls_name == "teacher"
    environment = service["environment"]
    for path in environment.values():
        assert path == "false" or path.removeprefix("/run/secrets/") in service["secrets"]
    flags = {"engine": "fake", "host": "0.0.0.0"}
    with pytest.raises(ConfigError, match="no authentication"):
        load_teacher_config(flags, environment)
    tenants = {
        key: interpolated(value) for key, value in TOKENS["services"][name]["environment"].items()
    }
    config, _ = load_teacher_config(flags, environment | tenants)
    assert (config.insecure, bool(config.tls_cert)) == (False, True)


@pytest.mark.parametrize("name", TRAINERS)
def test_with_tls_a_trainer_is_told_the_authority_and_else_the_same(name: str) -> None:
    service = TLS["services"][name]
    *plain, added = arguments(name, service)[:-6]
    assert plain == arguments(name)[:-6]
    assert added == "--set=teacher.tls_ca=/run/secrets/teacher-ca.pem"
    assert service["secrets"] == ["teacher-ca.pem"]


def test_an_overlay_changes_services_that_there_are() -> None:
    assert set(TOKENS["services"]) == {*TEACHERS, *TRAINERS}
    assert set(TLS["services"]) == {*TEACHERS, *TRAINERS, "prometheus"}
    assert set(TRAINER_HOST["services"]) <= set(TRAINERS)


@pytest.mark.parametrize("values", [{}, {"TEACHER_ENDPOINTS": ""}])
def test_an_address_that_no_default_can_know_is_asked_for(values: dict[str, str]) -> None:
    with pytest.raises(LookupError, match=r"TEACHER_ENDPOINTS is empty or not set; .* such as"):
        interpolated(" ".join(OVERLAYS["trainer-host"].read_text().split()), **values)


def test_every_variable_is_in_the_table() -> None:
    watched = (ROOT / "docker" / "observability.yml").read_text()
    used = {name for text in (*TEXTS, watched) for name, *_ in VARIABLE.findall(text)}
    readme = (ROOT / "docker" / "README.md").read_text()
    rows = re.findall(r"^\| (`[A-Z].*?) \|", readme, re.MULTILINE)
    rows = [row for row in rows if not row.startswith("`Dockerfile`")]
    told = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert set(told) == used | {"HF_TOKEN"}
    assert len(told) == len(set(told))


def test_secrets_are_neither_committed_nor_sent_to_docker() -> None:
    assert "secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    for content in (TOKENS, TLS):
        for secret in content["secrets"].values():
            assert interpolated(secret["file"]).startswith("./secrets/")
