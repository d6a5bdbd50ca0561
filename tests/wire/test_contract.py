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
from tests.waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py")
BUF = shutil.which("buf", path=sysconfig.get_path("scripts")) or shutil.which("buf")

needs_buf = pytest.mark.skipif(BUF is None, reason="buf is not installed")
needs_protoc = pytest.mark.skipif(
    importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed"
)


@needs_buf
@pytest.mark.parametrize(
    "arguments",
    [
        ["lint"],
        ["format", "--diff", "--exit-code"],
        ["breaking", "--against", "released.binpb"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_buf_is_content(arguments: list[str]) -> None:
    assert BUF is not None
    result = subprocess.run(
        [BUF, *arguments], cwd=ROOT / "proto", capture_output=True, text=True, timeout=LIMIT_S
    )
    assert result.returncode == 0, result.stdout + result.stderr


@needs_buf
@pytest.mark.parametrize(
    ("was", "becomes", "complaint"),
    [
        ("bytes entropies = 12;", "bytes entropies = 14;", "entropies"),
        ("double threshold = 2;", "float threshold = 2;", "threshold"),
        ("  uint32 k = 1;\n", "", "k"),
    ],
)
def test_a_change_that_breaks_clients_is_noticed(
    tmp_path: Path, was: str, becomes: str, complaint: str
) -> None:
    assert BUF is not None
    contract = Path("opd/teacher/v1/teacher.proto")
    text = (ROOT / "proto" / contract).read_text(encoding="utf-8")
    assert was in text
    (tmp_path / contract).parent.mkdir(parents=True)
    (tmp_path / contract).write_text(text.replace(was, becomes), encoding="utf-8")
    shutil.copy(ROOT / "proto/buf.yaml", tmp_path)
    command = [BUF, "breaking", "--against", str(ROOT / "proto/released.binpb")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert complaint in result.stdout


@needs_protoc
def test_generated_code_equals_regenerated(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        *("-I", f"teacher_wire/pb={ROOT / 'proto/opd/teacher/v1'}"),
        *(f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")),
        "teacher_wire/pb/teacher.proto",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
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
    assert set(methods) == {"GetInfo", "GetTokens", "Score", "Session"}
