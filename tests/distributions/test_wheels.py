"""What is in the two wheels, built from the tree as git has it. Run: pytest tests/distributions

Each in an environment of its own, and one without the other: make test-dist.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import teacher_wire

ROOT = Path(__file__).resolve().parents[2]
PACKED = {
    "driftline": (
        "student_trainer",
        "teacher_server",
        "rollout_records",
        "run_report",
        "preflight",
        "vllm_process",
    ),
    "driftline-client": ("teacher_client", "teacher_wire"),
}
FOLDERS = {"driftline": Path(), "driftline-client": Path("proto")}
MODULES = {".py", ".pyi"}


@dataclass(frozen=True)
class Wheel:
    """A built wheel, read."""

    files: frozenset[str]
    metadata: Message


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
    found = {}
    for name, folder in FOLDERS.items():
        out = tmp_path_factory.mktemp(name)
        code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
        command = [sys.executable, "-W", "ignore", "-c", code, str(out)]
        done = subprocess.run(command, cwd=tree / folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
            (described,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
            metadata = Parser().parsestr(archive.read(described).decode())
            found[name] = Wheel(frozenset(archive.namelist()), metadata)
    return found


def tracked() -> list[str]:
    """Files of the repository, without what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def in_tree(package: str) -> set[str]:
    """A package's files of the kinds that are packed, as they are named in a wheel."""
    kinds = {*MODULES, ".css", ".html", ".jinja", ".js", ".typed", ".proto"}
    names = {name.removeprefix("proto/") for name in tracked() if Path(name).suffix in kinds}
    names = {f"teacher_wire/{name}" if name.startswith("opd/") else name for name in names}
    return {name for name in names if name.startswith(f"{package}/")}


@pytest.mark.parametrize("name", PACKED)
def test_a_wheel_holds_all_of_its_packages_and_nothing_else(
    wheels: dict[str, Wheel], name: str
) -> None:
    packed = {file for file in wheels[name].files if ".dist-info/" not in file}
    assert packed == set().union(*(in_tree(package) for package in PACKED[name]))
    assert {f"{package}/py.typed" for package in PACKED[name]} <= packed


def test_the_contract_is_beside_the_code_that_was_made_from_it(wheels: dict[str, Wheel]) -> None:
    """Below the package, where protoc -I finds it by the path that its name asks for."""
    contract = f"teacher_wire/{teacher_wire.CONTRACT.replace('.', '/')}/teacher.proto"
    assert contract in wheels["driftline-client"].files


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_the_sources_that_are_handed_out_hold_the_contract(folder: Path, tmp_path: Path) -> None:
    """As setuptools makes them: what is built from them is built by `make dist`."""
    tree = tmp_path / "tree"
    for name in tracked():
        if Path(name).parts[0] in ("proto", "teacher_server", "student_trainer") or "/" not in name:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tree / folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    below = "" if folder.parts else "proto/"
    assert f"{below}opd/teacher/v1/teacher.proto" in names
    assert {"LICENSE", "pyproject.toml"} <= {*names}


def test_no_module_is_in_both(wheels: dict[str, Wheel]) -> None:
    first, second = (wheel.files for wheel in wheels.values())
    assert first & second == frozenset()
    assert "teacher_server/http/page/index.html" in wheels["driftline"].files


def test_both_have_one_version_and_driftline_requires_the_client_of_it(
    wheels: dict[str, Wheel],
) -> None:
    assert {wheel.metadata["Version"] for wheel in wheels.values()} == {teacher_wire.__version__}
    required = wheels["driftline"].metadata.get_all("Requires-Dist") or []
    pins = {line.split(";")[0].strip() for line in required if line.startswith("driftline-client")}
    same = f"=={teacher_wire.__version__}"
    assert pins == {f"driftline-client{same}", f"driftline-client[otel]{same}"}


def test_the_client_requires_no_model_and_no_engine(wheels: dict[str, Wheel]) -> None:
    required = wheels["driftline-client"].metadata.get_all("Requires-Dist") or []
    names = {re.split(r"[<>=;]", line)[0] for line in required if "extra ==" not in line}
    assert names == {"grpcio", "grpcio-status", "httpx", "numpy", "protobuf"}


def test_both_carry_their_licence(wheels: dict[str, Wheel]) -> None:
    for wheel in wheels.values():
        assert wheel.metadata["License-Expression"] == "Apache-2.0"
        assert wheel.metadata.get_all("License-File") == ["LICENSE"]
        assert any(file.endswith(".dist-info/licenses/LICENSE") for file in wheel.files)


def test_proto_is_no_package() -> None:
    # It would shadow that of the distribution proto-plus.
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_what_is_built_needs_one_build_backend() -> None:
    builds = [
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["build-system"]
        for folder in FOLDERS.values()
    ]
    assert builds[0] == builds[1]
