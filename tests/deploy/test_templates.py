"""Templates for Kubernetes and SLURM: right by the schemas of their tools, and of our own commands.

Run: python -m pytest tests/deploy/test_templates.py. The ServiceMonitor's schema is no part of
Kubernetes: it was validated by hand, and here by what it names.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from student_trainer.settings.config import load_config
from teacher_server.settings import TeacherConfig
from tests.tracked_files import ROOT
from tests.trainer.settings.smallest_config import SMALLEST

KUBERNETES, SLURM = ROOT / "deploy" / "kubernetes", ROOT / "deploy" / "slurm"
VERSION = "1.31"
"""Of the schemas; the fields that are used have been stable since 1.26."""


def objects() -> list[tuple[str, dict[str, Any]]]:
    return [
        (path.name, made)
        for path in sorted(KUBERNETES.glob("*.yaml"))
        for made in yaml.safe_load_all(path.read_text())
    ]


OBJECTS = objects()
BY_KIND = {made["kind"]: made for _, made in OBJECTS if made["metadata"]["name"] == "teacher"}
WORK = [made for _, made in OBJECTS if made["kind"] in ("Deployment", "StatefulSet", "Job")]


def pod(made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = made["spec"]["template"]["spec"]
    return found


def flags(words: list[str]) -> Iterator[tuple[str, str]]:
    """Names and values of --name=value and --name."""
    for word in words:
        if match := re.fullmatch(r"--([a-z-]+)(?:=(.*))?", word):
            yield match[1], match[2] or ""


@pytest.mark.parametrize(
    "made",
    [made for _, made in OBJECTS if made["kind"] != "ServiceMonitor"],
    ids=lambda made: f"{made['kind']} {made['metadata']['name']}",
)
def test_an_object_is_one_of_kubernetes(made: dict[str, Any]) -> None:
    kubernetes_validate.validate(made, VERSION, strict=True)


def test_the_schemas_would_see_a_mistake() -> None:
    wrong = yaml.safe_load((KUBERNETES / "replicas.yaml").read_text())
    pod(wrong)["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


@pytest.mark.parametrize("made", WORK, ids=lambda made: str(made["kind"]))
def test_a_pod_has_no_rights_and_no_variables_of_services(made: dict[str, Any]) -> None:
    spec = pod(made)
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 65532
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        assert {"/tmp", "/dev/shm", "/models"} <= {
            m["mountPath"] for m in container["volumeMounts"]
        }


def test_a_deployment_and_replicas_run_the_same_pod() -> None:
    assert BY_KIND["Deployment"]["spec"]["template"] == BY_KIND["StatefulSet"]["spec"]["template"]


def test_a_teacher_is_given_settings_that_there_are_and_time_to_drain() -> None:
    spec = pod(BY_KIND["Deployment"])
    (teacher,) = spec["containers"]
    given = dict(flags(teacher["args"]))
    assert {name.replace("-", "_") for name in given} <= set(TeacherConfig.model_fields)
    assert spec["terminationGracePeriodSeconds"] > float(given["drain-s"]) + 2
    ports = {port["name"]: port["containerPort"] for port in teacher["ports"]}
    assert ports == {"grpc": int(given["grpc-port"]), "http": int(given["http-port"])}
    for name in ("startupProbe", "readinessProbe"):
        assert f"--address=127.0.0.1:{given['grpc-port']}" in teacher[name]["exec"]["command"]
    startup = teacher["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600, "time for a download"


def test_what_selects_teachers_finds_them() -> None:
    labels = BY_KIND["Deployment"]["spec"]["template"]["metadata"]["labels"]
    service = BY_KIND["Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == labels == service["metadata"]["labels"]
    assert BY_KIND["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert BY_KIND["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert BY_KIND["StatefulSet"]["spec"]["serviceName"] == service["metadata"]["name"]
    monitor = BY_KIND["ServiceMonitor"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    trainer = next(made for made in WORK if made["kind"] == "Job")["spec"]["template"]
    (from_trainers, _) = BY_KIND["NetworkPolicy"]["spec"]["ingress"]
    (who,) = from_trainers["from"]
    assert who["podSelector"]["matchLabels"] == trainer["metadata"]["labels"]


def test_a_trainer_is_given_settings_that_there_are(tmp_path: Path) -> None:
    job = next(made for made in WORK if made["kind"] == "Job")
    (trainer,) = pod(job)["containers"]
    given = [value for name, value in flags(trainer["args"]) if name == "set"]
    assert len(given) == 4
    (tmp_path / "trainer.toml").write_text(SMALLEST)
    config = load_config(tmp_path / "trainer.toml", given)
    assert config.teacher.endpoints == ("teacher:50051",)
    words = dict(flags(trainer["args"]))
    assert int(words["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert words["resume"] == "auto"
    gpus = trainer["resources"]["limits"]["nvidia.com/gpu"]
    assert words["nproc-per-node"] == gpus


def test_secrets_and_maps_that_are_named_are_told_how_to_make() -> None:
    text = (KUBERNETES / "README.md").read_text()
    volumes = [volume for made in WORK for volume in pod(made)["volumes"]]
    secrets = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    for name in (*secrets, "hub"):
        assert f"secret generic {name}" in text
    assert "configmap trainer" in text


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_a_job_script_is_one_and_needs_what_it_says(path: Path) -> None:
    text = path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --signal=B:TERM@" in text
    done = subprocess.run(["bash", path], capture_output=True, text=True, env={"PATH": "/bin"})
    assert done.returncode != 0
    assert "a folder that all nodes see" in done.stderr or "the folder of teacher" in done.stderr
    given = set(re.findall(r"(?<=[ (])--([a-z-]+)", text.split("words=", 1)[-1]))
    if path.name == "teacher.sbatch":
        ours = {name.replace("-", "_") for name in given} & set(TeacherConfig.model_fields)
        assert {"model", "max_context", "drain_s", "ready_file", "insecure"} <= ours
