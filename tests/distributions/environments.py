"""Proves the built wheels in environments of their own.

Run: python -m tests.distributions.environments dist

Third-party packages of driftline come from the environment that runs this, by links, so that it
takes seconds; those of the client are installed from the package index, and nothing else is there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from teacher_wire import __version__
from tests.distributions.test_readme_of_the_client import examples
from tests.faults.live_server import LiveServer

OURS = re.compile(r"(__editable__.*|.*driftline.*)", re.IGNORECASE)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


class Environment:
    """A virtual environment without pip; ours installs into it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self._folder = folder
        venv.create(folder, with_pip=False)

    def link_third_parties(self) -> None:
        """Lets it see every package of the running environment but driftline's own."""
        links = self._folder / "third-parties"
        links.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not OURS.fullmatch(entry.name):
                (links / entry.name).symlink_to(entry)
        (site,) = self._folder.glob("lib/python*/site-packages")
        (site / "third-parties.pth").write_text(f"{links}\n")

    def pip(self, *arguments: str) -> str:
        command = [PIP[0], *PIP[1:3], "--python", str(self.bin / "python"), *PIP[3:], *arguments]
        return said(command)

    def complaints(self) -> list[str]:
        """What `pip check` says of driftline."""
        return [line for line in self.pip("check").splitlines() if "driftline" in line]

    def python(self, code: str) -> str:
        return said([str(self.bin / "python"), "-c", code])

    def script(self, name: str, *arguments: str) -> str:
        return said([str(self.bin / name), *arguments])


def said(command: list[str]) -> str:
    """What a command printed, whether it failed or not; never from our tree."""
    done = subprocess.run(
        command, cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=300
    )
    return (done.stdout + done.stderr).strip()


def claim(text: str, holds: bool, shown: str) -> None:
    """Prints one claim and what was seen; the first that does not hold ends the proof."""
    lines = "".join(f"       {line}\n" for line in shown.splitlines())
    sys.stdout.write(f"{'ok  ' if holds else 'FAIL'} {text}\n{lines}")
    sys.stdout.flush()
    if not holds:
        sys.exit(1)


IMPORT_CLIENT = """
import importlib.util as u, teacher_client, teacher_wire.codec
absent = [m for m in ("torch", "vllm", "teacher_server", "vllm_process") if not u.find_spec(m)]
print(teacher_client.TeacherClient.__name__, "and no", *absent)
"""
ALONE = "TeacherClient and no torch vllm teacher_server vllm_process"
CONTRACT = """
import importlib.resources as r, teacher_wire
path = teacher_wire.CONTRACT.replace(".", "/") + "/teacher.proto"
text = r.files("teacher_wire").joinpath(path).read_text()
print(f"package {teacher_wire.CONTRACT};" in text)
"""


def prove(driftline: Path, client_wheel: Path, folder: Path) -> None:
    """All claims, in order."""
    client, both = (Environment(folder / name) for name in ("client", "both"))
    client.pip("install", str(client_wheel))
    claim("driftline-client alone: nothing else", *equal(client.python(IMPORT_CLIENT), ALONE))
    claim("... and pip agrees", *equal(client.pip("check"), "No broken requirements found."))

    claim("... the contract is in it", *equal(client.python(CONTRACT), "True"))

    both.link_third_parties()
    alone = both.pip("install", "--no-deps", str(driftline))
    alone = alone.splitlines()[-1]
    claim("driftline alone installs", alone.startswith("Successfully installed driftline-"), alone)
    claim_half_is_named(both)
    both.pip("install", "--no-deps", str(client_wheel))
    claim("both: pip finds nothing missing", not both.complaints(), "\n".join(both.complaints()))
    imports = "import student_trainer.cli, teacher_server.cli, vllm_process.cores, teacher_client"
    claim("both: every package imports", *equal(both.python(imports), ""))
    for name in ("teacher-server", "student-trainer"):
        told = both.script(name, "--version")
        claim(f"{name} says which it is", told.startswith(f"{name} {__version__} "), told)
    claim_doctors_answer(both, folder)

    program = (str(both.bin / "teacher-server"), "serve", "--engine", "fake")
    teacher = LiveServer(folder, "--fake-vocab-size", "512", "--no-self-test", program=program)
    try:
        teacher.wait_until_ready()
        scored = ask(teacher, client)
        claim(
            "a teacher of driftline scores for driftline-client", "keep 5 tokens" in scored, scored
        )
        claim("... and for both in one environment", *equal(ask(teacher, both), scored))
        both.pip("uninstall", "-y", "driftline")
        claim("driftline removed: the client goes on", *equal(ask(teacher, both), scored))
    finally:
        teacher.end()
    both.pip("install", "--no-deps", str(driftline))
    both.pip("uninstall", "-y", "driftline-client")
    claim_half_is_named(both)


def claim_doctors_answer(environment: Environment, folder: Path) -> None:
    """They look at this machine as an installed program does."""
    wanted = {"check", "level", "seen", "limit", "remedy"}
    config = folder / "trainer.toml"
    config.write_text("[run]\n")
    for name, arguments in {
        "teacher-server": ["--engine", "fake", "--grpc-port", "0", "--http-port", "0"],
        "student-trainer": ["--config", str(config)],
    }.items():
        told = environment.script(name, "doctor", "--json", *arguments)
        found = json.loads(told)["findings"]
        lines = "\n".join(f"{one['level']} {one['check']}: {one['seen']}" for one in found)
        claim(f"{name} doctor", all(wanted == {*one} for one in found) and bool(found), lines)


def claim_half_is_named(environment: Environment) -> None:
    """Without the client, pip and both commands say in one line what is missing."""
    missing = "\n".join(environment.complaints())
    claim("without the client pip says so", "which is not installed" in missing, missing)
    commands = {
        "teacher-server": ["serve", "--engine=fake"],
        "student-trainer": ["train", "--config=x"],
    }
    for name, arguments in commands.items():
        line = environment.script(name, *arguments)
        good = "driftline-client is missing" in line and len(line.splitlines()) == 1
        claim(f"... and {name} does, in one line", good, line)


def equal(found: str, expected: str) -> tuple[bool, str]:
    return found == expected, found


def ask(teacher: LiveServer, environment: Environment) -> str:
    """What the two programs of the client's README print."""
    grpc, _, http = examples()  # the table needs an extra
    return "\n".join(
        environment.python(source.replace(printed, actual))
        for source, printed, actual in (
            (grpc, "127.0.0.1:50051", teacher.address),
            (http, "127.0.0.1:8080", teacher.http_address),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, help="folder with both wheels")
    folder = parser.parse_args().dist.resolve()
    os.environ.pop("PYTHONPATH", None)  # what is proven is what is installed
    (driftline,) = folder.glob("driftline-*.whl")
    (client_wheel,) = folder.glob("driftline_client-*.whl")
    with tempfile.TemporaryDirectory() as scratch:
        prove(driftline, client_wheel, Path(scratch))


if __name__ == "__main__":
    main()
