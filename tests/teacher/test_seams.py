"""What the service side must not pull in. Run: pytest tests/teacher/test_seams.py"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.waiting import LIMIT_S

HEAVY = ("torch", "vllm", "transformers", "teacher_server.engine.hf_engine")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("teacher_server.rpc.service", HEAVY),
        ("teacher_server.admission.scheduler", HEAVY),
        ("teacher_wire.drift", (*HEAVY, "teacher_wire.codec")),
        ("teacher_server.scoring.sessions", (*HEAVY, "teacher_wire.codec")),
        ("teacher_server.cli", (*HEAVY, "grpc", "uvicorn", "numpy")),
        ("teacher_client.client", (*HEAVY, "teacher_server")),
        ("teacher_server.testing", HEAVY),
    ],
)
def test_a_module_stays_light(module: str, unwanted: tuple[str, ...]) -> None:
    code = (
        f"import sys, {module}\n"
        f"found = sorted(set({unwanted!r}) & set(sys.modules))\n"
        "sys.exit(', '.join(found) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert result.returncode == 0, f"{module} imports {result.stderr.strip()}"
