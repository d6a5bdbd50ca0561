"""podman, buildah and Docker's Compose where there is no Docker; a base image by debootstrap.

Everything is below one folder and in one network namespace, so nothing of the machine's own
containers and network is touched. Needs root.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.docker.compose_files import ROOT
from tests.waiting import wait_until

NETAVARK = (Path("/usr/lib/podman/netavark"), Path("/usr/libexec/podman/netavark"))
PROGRAMS = ("buildah", "podman", "runc", "catatonit", "iptables", "ip", "nsenter", "debootstrap")
PLUGINS = (
    "/usr/libexec/docker/cli-plugins/docker-compose",
    "/usr/lib/docker/cli-plugins/docker-compose",
    "/usr/local/lib/docker/cli-plugins/docker-compose",
)
BASE = "localhost/driftline-base:debian"
MARKER = "a-secret-of-the-build"
"""Stands in the pip.conf that the build is given as a secret."""
CONTAINERS_CONF = """[containers]
default_ulimits = []
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"""


def said(*words: str, check: bool = True, **variables: str) -> str:
    """What a command prints. Raises AssertionError with what it complained of."""
    env = {**os.environ, **variables}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
    assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def compose_program() -> str | None:
    """`docker compose` by itself: COMPOSE, or where the packages put the plugin."""
    places = (os.environ.get("COMPOSE", ""), *PLUGINS)
    return next((place for place in places if place and Path(place).is_file()), None)


def missing() -> str:
    """What keeps images from being built and started here; empty where nothing does."""
    if os.geteuid() != 0:
        return "images are built and started as root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    absent += [] if any(path.exists() for path in NETAVARK) else ["netavark"]
    return f"not found: {', '.join(absent)}; Debian has packages of these names" if absent else ""


def found() -> dict[str, str]:
    """The programs and their versions."""
    versions = {
        name: said(name, "--version").splitlines()[0] for name in ("buildah", "podman", "runc")
    }
    compose = compose_program()
    versions["docker compose"] = said(compose, "version") if compose else "not found: not tried"
    versions["docker"] = shutil.which("dockerd") or "not found: podman's Docker API instead"
    return versions


@dataclass(slots=True)
class Engine:
    """podman with its own storage, network namespace and Docker API."""

    folder: Path
    namespace: str
    env: dict[str, str] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.folder / "podman.sock"

    def podman(self, *words: str, check: bool = True) -> str:
        inside = ("nsenter", f"--net=/run/netns/{self.namespace}", "podman")
        return said(*inside, *words, check=check, **self.env)

    def compose(self, *words: str, check: bool = True, **variables: str) -> str:
        """`docker compose` against podman's Docker API."""
        program = compose_program()
        assert program is not None
        host = {"DOCKER_HOST": f"unix://{self.socket}"}
        return said(program, *words, check=check, **self.env, **host, **variables)

    def check_health(self) -> None:
        """Runs every container's health check, as systemd's timers do where there is systemd."""
        for name in self.podman("ps", "--format", "{{.Names}}").split():
            self.podman("healthcheck", "run", name, check=False)


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """Storage stays in the folder; containers, volumes and networks end with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    storage, containers = folder / "storage.conf", folder / "containers.conf"
    graph, state = folder / "graph", folder / "run"
    storage.write_text(f'[storage]\ndriver="overlay"\ngraphroot="{graph}"\nrunroot="{state}"\n')
    containers.write_text(CONTAINERS_CONF)
    env = {"CONTAINERS_STORAGE_CONF": str(storage), "CONTAINERS_CONF": str(containers)}
    made = Engine(folder, f"driftline{os.getpid()}", env)
    made.socket.unlink(missing_ok=True)
    said("ip", "netns", "add", made.namespace)
    said("ip", "-n", made.namespace, "link", "set", "lo", "up")
    serve = ["nsenter", f"--net=/run/netns/{made.namespace}", "podman", "system", "service"]
    with (folder / "service.log").open("w") as log:
        service = subprocess.Popen(
            [*serve, "-t", "0", f"unix://{made.socket}"],
            env={**os.environ, **env},
            stdout=log,
            stderr=log,
        )
        try:
            wait_until(made.socket.exists)
            yield made
        finally:
            made.podman("rm", "--all", "--force", "--time", "1", check=False)
            made.podman("volume", "prune", "--force", check=False)
            made.podman("network", "prune", "--force", check=False)
            service.terminate()
            service.wait(60)
            said("ip", "netns", "delete", made.namespace, check=False)


def pip_configuration() -> tuple[str, list[Path]]:
    """pip's own configuration in one file, and the folders of this machine that it speaks of."""
    listed = said(sys.executable, "-m", "pip", "config", "list")
    values: dict[str, list[str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        values[name.split(".", 1)[1]] = str(ast.literal_eval(value)).split()
    values.pop("constraint", None)  # the list of versions is whole
    words = [word.removeprefix("file://") for value in values.values() for word in value]
    folders = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    lines = [f"{name} = " + "\n    ".join(value) for name, value in values.items()]
    text = "\n".join(["[global]", f"# {MARKER}", *lines, ""])
    mounted = [path if path.is_dir() else path.parent for path in folders]
    # An index of files lies beside the files that it names.
    return text, sorted({path.parent if path.name == "simple" else path for path in mounted})


def debian() -> str:
    """The release of this machine: its Python is the one that local wheels are for."""
    lines = Path("/etc/os-release").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)["VERSION_CODENAME"]


def base_image(made: Engine) -> str:
    """A stand-in for PYTHON_IMAGE: Debian with its own Python and the headers."""
    if made.podman("images", "--quiet", BASE):
        return BASE
    root = made.folder / "base"
    shutil.rmtree(root, ignore_errors=True)
    packages = "ca-certificates,python3,python3-venv,libpython3-dev,python-is-python3"
    said("debootstrap", "--variant=minbase", f"--include={packages}", debian(), str(root))
    for leftover in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*")):
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    said("tar", "-C", str(root), "-cf", str(made.folder / "base.tar"), ".")
    made.podman("import", str(made.folder / "base.tar"), BASE)
    shutil.rmtree(root)
    (made.folder / "base.tar").unlink()
    return BASE


def build(made: Engine, target: str, version: str) -> float:
    """driftline-<target>:cpu by buildah; returns how many seconds that took."""
    started = time.monotonic()
    text, folders = pip_configuration()
    secret = made.folder / "pip.conf"
    secret.write_text(text)
    mounts = [word for folder in folders for word in ("--volume", f"{folder}:{folder}:ro")]
    arguments: Mapping[str, str] = {
        "PYTHON_IMAGE": BASE,
        # Set and empty: torch's CPU build is where pip looks anyway.
        "TORCH_INDEX": os.environ.get("TORCH_INDEX", ""),
        "VERSION": version,
    }
    words = [
        word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")
    ]
    said(
        *("nice", "-n", "5", "buildah", "bud", "--isolation", "chroot", "--format", "docker"),
        *("--layers", "--target", target, "--file", "docker/Dockerfile"),
        *("--secret", f"id=pip.conf,src={secret}", *mounts, *words),
        *("--tag", f"driftline-{target}:cpu", "."),
        **made.env,
    )
    secret.unlink()
    return time.monotonic() - started


def inspected(made: Engine, image: str) -> dict[str, object]:
    """Of an image, all that podman knows."""
    (found_image,) = json.loads(made.podman("image", "inspect", image))
    return dict(found_image)
