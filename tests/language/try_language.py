"""`make test-language`: the demo with a real model, shorter. Does it move the right way?

Three steps, and eight prompts that the demo's report does not use. About 6 minutes on two cores,
where `make demo-language` has left the model; it is fetched otherwise.
Run: pytest tests/language/try_language.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MADE = ("source", "teacher", "data", "student", "pruning.json")
"""What the demo makes before it measures anything."""
NUM_STEPS = 3
WAIT_S = 3600


def demo(out: Path) -> str:
    command = [sys.executable, "-m", "examples.language", "--out", str(out), "--part", "tune"]
    command += ["--prompts", "8", "--set", f"run.steps={NUM_STEPS}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "measured" / f"{name}-tune.json").read_text())
    return found["figures"]["all"]


@pytest.mark.timeout(2 * WAIT_S)
def test_three_steps_move_the_student_towards_its_teacher(tmp_path: Path) -> None:
    for name in MADE:
        if (ROOT / "runs" / "language" / name).exists():
            (tmp_path / name).symlink_to(ROOT / "runs" / "language" / name)
    demo(tmp_path)
    teacher, before, after = (figures(tmp_path, name) for name in ("teacher", "before", "after"))
    assert teacher["reverse_kl"] == 0.0
    assert after["reverse_kl"] < 0.85 * before["reverse_kl"]
    assert after["teacher_logprob"] > before["teacher_logprob"]
    steps = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "step"
    ]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert max(step["sync_gap_nats"] for step in steps) < 1e-3
    assert (tmp_path / "report" / "overlap.png").stat().st_size > 10_000
    again = demo(tmp_path)
    assert "trained already" in again
    assert "answers to" not in again
