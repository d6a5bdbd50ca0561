"""Templates for Kubernetes and SLURM: right by the schemas of their tools, and of our own commands.

Run: python -m pytest tests/deploy/test_templates.py. The ServiceMonitor's schema is no part of
Kubernetes: it was validated by hand, and here by what it names.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from student_trainer.assembly.spreading import refuse_spread
from student_trainer.process.ranks import Ranks
from student_trainer.settings.config import load_config
from teacher_server.settings import TeacherConfig
from tests.tracked_files import ROOT
from tests.waiting import LIMIT_S, wait_until

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
PODS = [*WORK, *(made for _, made in OBJECTS if made["kind"] == "Pod")]
JOB = next(made for made in WORK if made["kind"] == "Job")


def pod(made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = made["spec"]
    if made["kind"] != "Pod":
        found = found["template"]["spec"]
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


@pytest.mark.parametrize("made", PODS, ids=lambda made: str(made["kind"]))
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
        if made in WORK:
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


def documented(folder: Path, variable: str) -> str:
    """The configuration that a README's commands take."""
    match = re.search(
        rf"{re.escape(variable)}=(configs/\S+\.toml)", (folder / "README.md").read_text()
    )
    assert match is not None
    return match[1]


def test_a_trainer_is_given_settings_that_there_are_and_that_16_processes_can_share() -> None:
    (trainer,) = pod(JOB)["containers"]
    given = [value for name, value in flags(trainer["args"]) if name == "set"]
    assert len(given) == 5
    config = load_config(ROOT / documented(KUBERNETES, "trainer.toml"), given)
    assert config.teacher.endpoints == ("teacher:50051",)
    words = dict(flags(trainer["args"]))
    assert int(words["nnodes"]) == JOB["spec"]["completions"] == JOB["spec"]["parallelism"]
    assert words["resume"] == "auto"
    gpus = trainer["resources"]["limits"]["nvidia.com/gpu"]
    assert words["nproc-per-node"] == gpus
    refuse_spread(config, Ranks(world=int(words["nnodes"]) * int(gpus)))


def test_a_trainer_has_the_data_of_its_configuration() -> None:
    config = load_config(ROOT / documented(KUBERNETES, "trainer.toml"), [])
    (trainer,) = pod(JOB)["containers"]
    mounts = {mount["mountPath"]: mount for mount in trainer["volumeMounts"]}
    assert "ln -s /data /app/data" in (ROOT / "docker" / "Dockerfile").read_text()
    assert config.data.train.parts[0] == "data"
    assert mounts["/data"]["readOnly"] is True
    volumes = {volume["name"]: volume for volume in pod(JOB)["volumes"]}
    claim = volumes[mounts["/data"]["name"]]["persistentVolumeClaim"]["claimName"]
    (filling,) = [made for made in PODS if made["kind"] == "Pod"]
    assert [v["persistentVolumeClaim"]["claimName"] for v in pod(filling)["volumes"]] == [claim]
    assert f"kubectl cp {config.data.train} data:/data/" in (KUBERNETES / "README.md").read_text()


def test_claims_that_are_named_are_made() -> None:
    named = {
        volume["persistentVolumeClaim"]["claimName"]
        for made in PODS
        for volume in pod(made)["volumes"]
        if "persistentVolumeClaim" in volume
    }
    claims = [made for _, made in OBJECTS if made["kind"] == "PersistentVolumeClaim"]
    assert named == {made["metadata"]["name"] for made in claims}
    text = (KUBERNETES / "README.md").read_text()
    for made in claims:
        assert made["spec"]["accessModes"] == ["ReadWriteMany"]
        assert f"`{made['metadata']['name']}`" in text


def test_only_trainers_reach_the_rendezvous() -> None:
    labels = JOB["spec"]["template"]["metadata"]["labels"]
    policies = [made["spec"] for _, made in OBJECTS if made["kind"] == "NetworkPolicy"]
    (policy,) = [found for found in policies if found["podSelector"] == {"matchLabels": labels}]
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]
    for folder in (KUBERNETES, SLURM):
        assert "runs code" in (folder / "README.md").read_text(), "what the port is"


@pytest.mark.parametrize(("ended", "code"), [(2, 2), (3, 1)])
def test_a_setting_that_is_wrong_ends_the_job_and_what_else_fails_does_not(
    ended: int, code: int
) -> None:
    (trainer,) = pod(JOB)["containers"]
    assert trainer["command"][0] == "python"
    words = ["--nnodes=1", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    words += ["--rdzv-endpoint=127.0.0.1:0", "--no-python", "sh", "-c", f"exit {ended}"]
    done = subprocess.run(
        [sys.executable, *trainer["command"][1:], *words], capture_output=True, timeout=LIMIT_S
    )
    assert done.returncode == code
    rules = JOB["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "FailJob"]
    assert rules[1]["onExitCodes"] == {
        "containerName": trainer["name"],
        "operator": "In",
        "values": [2],
    }


def test_secrets_and_maps_that_are_named_are_told_how_to_make() -> None:
    text = (KUBERNETES / "README.md").read_text()
    volumes = [volume for made in WORK for volume in pod(made)["volumes"]]
    secrets = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    for name in (*secrets, "hub"):
        assert f"secret generic {name}" in text
    assert "--from-literal" not in text, "a command line is everybody's"
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


def test_the_documented_trainer_is_one_that_its_processes_can_share() -> None:
    text = (SLURM / "README.md").read_text().replace("\\\n", " ")
    script = (SLURM / "trainer.sbatch").read_text()
    (command,) = [
        line for line in text.splitlines() if line.endswith("deploy/slurm/trainer.sbatch")
    ]
    given = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
    extra = shlex.split(given.get("TRAIN_FLAGS", ""))
    config = load_config(ROOT / given["CONFIG"], [word for word in extra if word != "--set"])
    (nodes,) = re.findall(r"^#SBATCH --nodes=(\d+)$", script, re.MULTILINE)
    (gpus,) = re.findall(r"^#SBATCH --gres=gpu:(\d+)$", script, re.MULTILINE)
    assert f"GPUS=${{GPUS:-{gpus}}}" in script
    refuse_spread(config, Ranks(world=int(nodes) * int(gpus)))


def teacher_job(folder: Path, **variables: str) -> subprocess.Popen[str]:
    """The script of a teacher, with the fake engine and no SLURM around it."""
    command = folder / "bin" / "teacher-server"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m teacher_server.cli "$@"\n')
    command.chmod(0o755)
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        ["bash", SLURM / "teacher.sbatch"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}",
            "TMPDIR": str(folder / "tmp"),
            "SHARED": str(folder),
            "MODEL": str(ROOT / "examples" / "playground" / "checkpoints" / "teacher"),
            "MAX_CONTEXT": "256",
            "SERVE_FLAGS": "--engine fake",
            "SLURM_JOB_ID": "12",
            **variables,
        },
    )


def test_a_teacher_without_tokens_or_tls_is_refused_unless_that_is_said(tmp_path: Path) -> None:
    job = teacher_job(tmp_path)
    try:
        _, said = job.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGTERM)
        raise
    assert job.returncode == 2, said
    assert "there is no authentication" in said


@pytest.mark.e2e
def test_where_a_teacher_is_reached_is_never_what_an_earlier_one_left(tmp_path: Path) -> None:
    teachers = tmp_path / "teachers"
    teachers.mkdir()
    (teachers / "12-0").write_text("gone:1\n")
    foreign = tmp_path / "tmp" / "driftline-12.json"
    foreign.parent.mkdir()
    foreign.write_text('{"grpc_address": "foreign:2"}\n')
    seen: list[str] = []

    def told() -> bool:
        seen[:] = [path.read_text() for path in teachers.glob("12-0")]
        return job.poll() is not None or seen not in ([], ["gone:1\n"])

    job = teacher_job(tmp_path, INSECURE="1")
    try:
        wait_until(told)
    finally:
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=LIMIT_S)
    assert re.fullmatch(r"\S+:[1-9]\d{3,4}\n", "".join(seen)), (seen, said)
    assert job.returncode == 0, said
    assert list(teachers.iterdir()) == []
    assert foreign.exists()
    assert list(foreign.parent.glob("tmp.*")) == [], "the folder of its own"


def test_a_trainer_takes_no_file_that_is_being_written(tmp_path: Path) -> None:
    teachers = tmp_path / "teachers"
    teachers.mkdir()
    for name, place in (("12-0", "a:1"), ("12-11", "b:2"), ("12-1.new", "c:3")):
        (teachers / name).write_text(place + "\n")
    script = (SLURM / "trainer.sbatch").read_text()
    (function,) = re.findall(r"^endpoints\(\).*$", script, re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", f"{function}\nendpoints"],
        env={"PATH": os.environ["PATH"], "SHARED": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == '"a:1","b:2"\n'
