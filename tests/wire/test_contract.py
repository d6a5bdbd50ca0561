"""The contract is lint-clean and its generated code is current. Run: pytest tests/wire"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from teacher_wire.pb import teacher_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py")
BUF = shutil.which("buf", path=sysconfig.get_path("scripts")) or shutil.which("buf")

needs_buf = pytest.mark.skipif(BUF is None, reason="buf is not installed")
needs_protoc = pytest.mark.skipif(
    importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed"
)


@needs_buf
@pytest.mark.parametrize("arguments", [["lint"], ["format", "--diff", "--exit-code"]])
def test_buf_is_content(arguments: list[str]) -> None:
    assert BUF is not None
    result = subprocess.run(
        [BUF, *arguments], cwd=ROOT / "proto", capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


@needs_protoc
def test_generated_code_equals_regenerated(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        *("-I", f"teacher_wire/pb={ROOT / 'proto/opd/teacher/v1'}"),
        *(f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")),
        "teacher_wire/pb/teacher.proto",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in GENERATED:
        committed = ROOT / "proto/teacher_wire/pb" / name
        fresh = tmp_path / "teacher_wire/pb" / name
        assert committed.read_text() == fresh.read_text(), f"{name} is stale: run make proto"


def test_every_enum_starts_unspecified() -> None:
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


def test_the_contract_is_versioned() -> None:
    assert pb.DESCRIPTOR.package == "opd.teacher.v1"
    methods = pb.DESCRIPTOR.services_by_name["TeacherService"].methods_by_name
    assert set(methods) == {"GetInfo", "Score", "Session"}
