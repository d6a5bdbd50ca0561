"""The client's README does what it prints, against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.live_server import live_server
from tests.waiting import LIMIT_S

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "proto" / "README.md"


def examples() -> tuple[str, str, str]:
    """The programs in the README: over gRPC, a table, records over HTTP."""
    found = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    grpc, table, http = found
    return grpc, table, http


def test_the_examples_print_a_verdict_and_ranks(tmp_path: Path) -> None:
    with live_server(tmp_path, "--fake-vocab-size", "512", "--no-self-test") as teacher:
        grpc, table, http = (
            subprocess.run(
                [sys.executable, "-c", source.replace(printed, actual)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
            for source, printed, actual in zip(
                examples(),
                ("127.0.0.1:50051", "127.0.0.1:8080", "127.0.0.1:8080"),
                (teacher.address, teacher.http_address, teacher.http_address),
                strict=True,
            )
        )
    assert (grpc.returncode, http.returncode) == (0, 0), grpc.stderr + http.stderr
    assert table.returncode == 0, table.stderr
    lines = grpc.stdout.splitlines()
    assert lines[0].startswith("continue [")
    assert lines[1].startswith("truncate [")
    assert lines[2] == "stop here and keep 5 tokens"
    model, scored = http.stdout.splitlines()
    assert model == "fake-512"
    ranks = re.findall(r"\d+", scored.rpartition("[")[2])
    shown = [line.split() for line in table.stdout.splitlines()[1:]]
    assert [row[4] for row in shown] == ranks
    assert len(ranks) == 3
