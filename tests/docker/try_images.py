"""The images built, measured and started: directly, and by Docker's Compose, without Docker.

On a machine with buildah and podman, as root; tests/docker/README.md says what is needed. What is
not at hand is said and not tried. Run: make test-images
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from teacher_server.access.tenants_file import new_token
from teacher_wire import __version__
from tests.docker.compose_files import OVERLAYS, ROOT
from tests.docker.container_engine import (
    BASE,
    MARKER,
    Engine,
    base_image,
    build,
    compose_program,
    engine,
    found,
    inspected,
    missing,
)
from tests.faults.made_certificates import Authority
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
needs_compose = pytest.mark.skipif(compose_program() is None, reason="Docker's Compose is not here")

LIMIT_S = 900.0
MOST = 1.15
"""Of the unpacked wheels plus the base image."""
TEACHER, TRAINER = "driftline-teacher:cpu", "driftline-trainer:cpu"
# As docker-compose.yml has it; the memory of a tmpfs is read-only's own in podman.
HARDENED = (
    *("--init", "--read-only", "--read-only-tmpfs=false", "--user", "65532:65532"),
    *("--tmpfs", "/tmp:exec,mode=1777,size=4g", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--shm-size", "1g"),
    *(
        "--volume",
        f"{ROOT}/configs:/app/configs:ro",
        "--volume",
        f"{ROOT}/examples:/app/examples:ro",
    ),
)
SERVE = (
    *("serve", "--config", "configs/teacher-demo.toml", "--host", "0.0.0.0", "--insecure"),
    *("--grpc-port", "50051", "--http-port", "8080"),
)
SCORED = (
    "sum(float(l.split()[-1]) for l in t.splitlines() if l.startswith('teacher_tokens_scored'))"
)
ASK = f"import urllib.request as u; t = u.urlopen('{{url}}').read().decode(); print({SCORED})"
WHEELS = """
from importlib.metadata import distributions
from pathlib import Path
files = [f for d in distributions() for f in d.files or [] if f.suffix != ".pyc"]
print(sum(Path(f.locate()).stat().st_size for f in files if Path(f.locate()).is_file()))
"""
SMALL = {
    "rollout.prompts_per_step": 2,
    "budget.max_tokens": 32,
    "data.heldout": "null",
    "sampler.max_num_seqs": 8,
    "sampler.kv_cache_gib": 0.1,
    "checkpoint.every_steps": 1000,
    "run.steps": 1000,
}
"""Of a trainer that has steps of a second."""


def tell(text: str) -> None:
    """A figure, for whoever runs this."""
    sys.stdout.write(f"\n  {text}")


@pytest.fixture(scope="module")
def made() -> Iterator[Engine]:
    """podman, and both images."""
    for name, version in found().items():
        tell(f"{name}: {version}")
    with engine(ROOT / "build" / "images") as podman:
        base_image(podman)
        for target in ("trainer", "teacher"):
            tell(f"driftline-{target}:cpu built in {build(podman, target, __version__):.0f} s")
        yield podman


def layers(made: Engine, image: str) -> list[str]:
    found_layers: list[str] = inspected(made, image)["RootFS"]["Layers"]  # type: ignore[index]
    return found_layers


def test_both_images_are_one_in_all_layers_and_small(made: Engine) -> None:
    assert layers(made, TEACHER) == layers(made, TRAINER)
    sizes = {name: int(str(inspected(made, name)["Size"])) for name in (TEACHER, BASE)}
    wheels = int(made.podman("run", "--rm", "--entrypoint", "python", TEACHER, "-c", WHEELS))
    ratio = sizes[TEACHER] / (wheels + sizes[BASE])
    tell(
        f"image {sizes[TEACHER] / 1e6:,.0f} MB, wheels {wheels / 1e6:,.0f} MB, "
        f"base {sizes[BASE] / 1e6:,.0f} MB: {ratio:.3f}"
    )
    assert ratio <= MOST


def test_no_layer_has_a_secret(made: Engine) -> None:
    data: dict[str, str] = inspected(made, TEACHER)["GraphDriver"]["Data"]  # type: ignore[index]
    base: dict[str, str] = inspected(made, BASE)["GraphDriver"]["Data"]  # type: ignore[index]
    folders = [data["UpperDir"], *data["LowerDir"].split(":")]
    folders = [folder for folder in folders if folder != base["UpperDir"]]
    assert len(folders) >= 4
    marked = subprocess.run(
        ["grep", "-rlaF", MARKER, *folders], capture_output=True, text=True, check=False
    )
    assert (marked.returncode, marked.stdout) == (1, ""), "pip.conf is in a layer"
    suspicious = re.compile(r"(^|/)(pip\.conf|\.netrc|\.npmrc|\.git|id_\w+|.*\.key|tenants\.toml)$")
    names = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    assert [str(path) for path in names if suspicious.search(str(path))] == []
    assert MARKER not in made.podman("history", "--no-trunc", "--format", "json", TEACHER)
    assert MARKER not in json.dumps(inspected(made, TEACHER))


def test_an_image_says_what_it_is(made: Engine) -> None:
    for name, script in ((TEACHER, "teacher-server"), (TRAINER, "student-trainer")):
        config: dict[str, Any] = inspected(made, name)["Config"]  # type: ignore[assignment]
        assert (config["User"], config["Entrypoint"]) == ("65532:65532", [script])
        labels = config["Labels"]
        assert labels["org.opencontainers.image.version"] == __version__
        assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    check = made.podman("image", "inspect", "--format", "{{json .HealthCheck}}", TEACHER)
    assert "teacher-server probe" in check


def test_an_image_has_a_compiler_and_no_other_tools(made: Engine) -> None:
    look = "command -v g++; command -v pip pip3 make git curl wget cmake ninja; true"
    there = made.podman("run", "--rm", "--entrypoint", "sh", TEACHER, "-c", look).split()
    assert there == ["/usr/bin/g++"]


def test_a_teacher_with_a_read_only_root_scores_a_token(made: Engine) -> None:
    started = time.monotonic()
    made.podman("run", "--detach", "--name", "alone", *HARDENED, TEACHER, *SERVE)
    wait_until(lambda: is_healthy(made, "alone"), LIMIT_S)
    body = {"prompt_ids": [1, 2, 3], "response_ids": [4]}
    ask = (
        "import json, urllib.request as u; r = u.Request('http://127.0.0.1:8080/v1/score', "
        f"json.dumps({body!r}).encode(), {{'content-type': 'application/json'}}); "
        "print(u.urlopen(r).read().decode())"
    )
    answer = json.loads(made.podman("exec", "alone", "python", "-c", ask))
    tell(
        f"a token scored {time.monotonic() - started:.0f} s after `podman run`: {str(answer)[:90]}"
    )
    assert answer
    refused = made.podman("exec", "alone", "touch", "/app/x", check=False)
    assert refused == ""
    assert "Read-only file system" in said_by(made, "exec", "alone", "touch", "/app/x")
    made.podman("stop", "alone")
    assert made.podman("inspect", "--format", "{{.State.ExitCode}}", "alone") == "0"
    made.podman("rm", "alone")


def said_by(made: Engine, *words: str) -> str:
    """What a command that fails complains of."""
    with pytest.raises(AssertionError) as caught:
        made.podman(*words)
    return str(caught.value)


def is_healthy(made: Engine, name: str) -> bool:
    """By its own check. Fails when it has ended."""
    state = made.podman("inspect", "--format", "{{.State.Status}}", name)
    assert state == "running", made.podman("logs", name)
    made.podman("healthcheck", "run", name, check=False)
    return made.podman("inspect", "--format", "{{.State.Health.Status}}", name) == "healthy"


@contextmanager
def health(made: Engine) -> Iterator[None]:
    """Checked every few seconds: podman leaves that to systemd, which may not be there."""
    over = threading.Event()

    def check() -> None:
        while not over.wait(3.0):
            made.check_health()

    thread = threading.Thread(target=check)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@needs_compose
@pytest.mark.parametrize("profile", ["cpu", "gpu", "replicas", "download"])
@pytest.mark.parametrize("overlays", [(), ("tokens",), ("tokens", "tls")])
def test_compose_renders_every_profile_and_overlay(
    made: Engine, profile: str, overlays: tuple[str, ...]
) -> None:
    files = [word for name in overlays for word in ("--file", str(OVERLAYS[name]))]
    words = ("--file", "docker-compose.yml", *files, "--profile", profile)
    made.compose(*words, "config", "--quiet")
    host = ("--file", str(OVERLAYS["trainer-host"]))
    with pytest.raises(AssertionError, match="TEACHER_ENDPOINTS is missing a value: is empty"):
        made.compose(*words, *host, "config", "--quiet", TEACHER_ENDPOINTS="")
    endpoints = '["teacher.example:50051"]'
    made.compose(*words, *host, "config", "--quiet", TEACHER_ENDPOINTS=endpoints)


class Project:
    """docker-compose.yml with overlays, and trainers whose steps are short."""

    def __init__(self, made: Engine, folder: Path, *overlays: str) -> None:
        self._made = made
        settings = SMALL | {"teacher.endpoints": '["teacher:50051"]'}
        if "tls" in overlays:
            settings |= {"teacher.tls_ca": "/run/secrets/teacher-ca.pem"}
        command = ["--config=configs/trainer-demo.toml"]
        command += [f"--set={name}={value}" for name, value in settings.items()]
        small = folder / "small.yml"
        small.write_text(json.dumps({"services": {"trainer": {"command": command}}}))
        files = (ROOT / "docker-compose.yml", *(OVERLAYS[name] for name in overlays), small)
        self._words = [word for path in files for word in ("--file", str(path))]
        self.variables: dict[str, str] = {}

    def __call__(self, *words: str) -> str:
        every = ("--project-directory", str(ROOT), *self._words, "--profile", "cpu")
        return self._made.compose(*every, *words, **self.variables)

    def inside(self, service: str, code: str) -> str:
        return self("exec", "-T", service, "python", "-c", code)

    def steps(self, number: int) -> int:
        """Finished by a run."""
        path = f"/runs/demo-{number}/metrics.jsonl"
        count = f'grep -c \'"kind": *"step"\' {path} 2>/dev/null || true'
        return int(self("exec", "-T", "trainer", "sh", "-c", count) or 0)

    def file(self, path: str) -> str:
        """Of the volume `runs`, whoever runs."""
        name = next(v for v in self._made.podman("volume", "ls", "-q").split() if "runs" in v)
        folder = self._made.podman("volume", "inspect", "--format", "{{.Mountpoint}}", name)
        found_path = Path(folder) / path
        return found_path.read_text() if found_path.exists() else ""

    def exits(self) -> list[int]:
        ids = self("ps", "--all", "--quiet", "trainer").split()
        return [
            int(self._made.podman("inspect", "--format", "{{.State.ExitCode}}", i)) for i in ids
        ]


def seeds(project: Project) -> list[int]:
    """Of both runs, as they were resolved."""
    return [
        json.loads(project.file(f"demo-{number}/config.json"))["run"]["seed"] for number in (1, 2)
    ]


@needs_compose
def test_trainers_go_on_after_stop_start_and_down(made: Engine, tmp_path: Path) -> None:
    project = Project(made, tmp_path)
    with health(made):
        started = time.monotonic()
        project("up", "--detach", "--no-build", "--scale", "trainer=2")
        tell(f"`compose up`, two trainers: started in {time.monotonic() - started:.0f} s")
        ask = ASK.format(url="http://127.0.0.1:8080/metrics")
        wait_until(lambda: float(project.inside("teacher", ask)) > 0, LIMIT_S)
        tell(f"first scored token {time.monotonic() - started:.0f} s after `compose up`")
        wait_until(lambda: min(project.steps(1), project.steps(2)) >= 2, LIMIT_S)
        project("stop", "trainer")
        first = saved(project)
        assert seeds(project) == [0, 1]
        assert project.file("demo-1/metrics.jsonl") != project.file("demo-2/metrics.jsonl")
        project("start", "trainer")
        wait_until(lambda: min(project.steps(n) - first[n - 1] for n in (1, 2)) >= 2, LIMIT_S)
        project("down")
        second = saved(project)
        assert all(later > earlier for later, earlier in zip(second, first, strict=True))
        project("up", "--detach", "--no-build", "--scale", "trainer=2")
        wait_until(lambda: min(project.steps(n) - second[n - 1] for n in (1, 2)) >= 1, LIMIT_S)
        project("down", "--volumes")
    tell(f"steps saved by `stop`: {first}, by `down`: {second}, and both runs went on")


def saved(project: Project) -> list[int]:
    """The last step of each run, which has a checkpoint."""
    assert all(code in (0, 143) for code in project.exits())
    lasts = []
    for number in (1, 2):
        records = [json.loads(x) for x in project.file(f"demo-{number}/metrics.jsonl").splitlines()]
        last = max(record["step"] for record in records if record["kind"] == "step")
        checkpoint = f"demo-{number}/checkpoints/step-{last:06d}/config.json"
        assert project.file(checkpoint), f"step {last} of run {number} is not saved"
        lasts.append(last)
    return lasts


@needs_compose
def test_with_tokens_and_tls_a_teacher_turns_healthy_and_is_asked(
    made: Engine, tmp_path: Path
) -> None:
    project = Project(made, tmp_path, "tokens", "tls")
    authority = Authority(tmp_path, "site")
    pair = authority.issue("teacher", hosts=("teacher",))
    token, lines = new_token("demo")
    files = {
        "TENANTS_FILE": lines,
        "TEACHER_TOKEN_FILE": token,
        "TLS_CERT_FILE": pair.cert.read_text(),
        "TLS_KEY_FILE": pair.key.read_text(),
        "TLS_CA_FILE": authority.ca.read_text(),
    }
    for variable, text in files.items():
        path = tmp_path / variable
        path.write_text(text)
        shutil.chown(path, 65532, 65532)
        path.chmod(0o400)
        project.variables[variable] = str(path)
    tmp_path.chmod(0o755)
    with health(made):
        project("up", "--detach", "--no-build")
        wait_until(lambda: project.steps(1) >= 1, LIMIT_S)
        assert "insecure" not in project("logs", "teacher")
        project("down", "--volumes")
