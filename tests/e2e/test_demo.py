"""The demo as a user runs it, only shorter. Run: pytest tests/e2e/test_demo.py"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "run.steps": "3",
    "rollout.prompts_per_step": "24",
    "eval.num_prompts": "8",
    "eval.pass_k": "2",
    "eval.every_steps": "100",
}
SUMMARY_KEYS = {
    "accuracy_before",
    "accuracy_after",
    "teacher_accuracy",
    "steps",
    "wall_s",
    "generated_tokens",
    "kept_tokens",
    "overshoot_tokens",
    "truncated_rollouts_first_step",
    "truncated_rollouts_last_step",
    "share",
}

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]


def demo(out: Path) -> list[str]:
    """The command of a short demo that writes to `out`."""
    overrides = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "examples.demo", "--out", str(out), *overrides]


def processes_naming(text: str) -> list[int]:
    """Ids of the processes whose command line holds `text`, this one left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue  # it has just ended
            if text in command:
                found.append(int(entry.name))
    return found


@pytest.mark.timeout(480)
def test_a_short_demo_trains_reports_and_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        demo(out), cwd=ROOT, capture_output=True, text=True, timeout=460, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 3
    assert set(summary["share"]) == {"generate", "teacher_wait", "learn", "sync"}
    assert sum(summary["share"].values()) == pytest.approx(1.0, abs=1e-3)
    assert summary["teacher_accuracy"] >= 0.75  # >= 0.95 on many problems; these are eight
    assert summary["accuracy_before"] <= 0.5
    assert summary["truncated_rollouts_first_step"] > 0
    assert summary["generated_tokens"] == summary["kept_tokens"] + summary["overshoot_tokens"]
    assert summary["sync_gap_nats_max"] < 1e-4
    assert summary["overshoot_mean"] <= summary["overshoot_bound_mean"]
    assert (out / "report.png").stat().st_size > 10_000
    assert (out / "student" / "model.safetensors").is_file()
    assert (out / "student" / "tokenizer.json").is_file()
    assert processes_naming(str(out)) == []


@pytest.mark.timeout(90)
def test_an_interrupted_demo_ends_what_it_started(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.Popen(demo(out), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while len(processes_naming(str(out))) < 2:
            assert time.monotonic() < deadline, "the teacher server was not started"
            time.sleep(0.2)
        time.sleep(3)  # into the start of the engine, where it has children of its own
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait()
        left = processes_naming(str(out))
        for pid in left:  # each leads, or belongs to, a group that the demo made
            os.killpg(os.getpgid(pid), signal.SIGKILL)
    assert process.returncode == 130
    assert "interrupted" in stdout
    assert left == []
