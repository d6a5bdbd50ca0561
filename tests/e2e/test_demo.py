"""The demo as a user runs it, only shorter. Run: pytest tests/e2e/test_demo.py"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.rounds import in_the_long_round

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "run.steps": "2",
    "rollout.prompts_per_step": "6",
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
SPAWNED = ("spawn_main", "VLLM::EngineCore")
"""What the command line of an engine's own process holds, before and after it names itself."""

DYING_S = 60.0

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]


class Demo:
    """A short demo that is under way, in a session of its own."""

    def __init__(self, out: Path) -> None:
        self.out = out
        overrides = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.demo", "--out", str(out), *overrides],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout

    def processes(self) -> dict[int, str]:
        """Id -> command line of everything of the demo that runs: all that is in its session."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it has just ended
                if entry.name.isdigit() and os.getsid(int(entry.name)) == self.process.pid:
                    command = (entry / "cmdline").read_bytes().decode(errors="replace")
                    if command:  # else it has ended, and nobody has asked how
                        found[int(entry.name)] = command
        return found

    def starts_an_engine(self) -> bool:
        """Whether a process of the demo's processes has been started."""
        commands = self.processes().values()
        return any(part in command for command in commands for part in SPAWNED)

    def end(self) -> str:
        """Waits for its end; returns what it printed. What it killed may still be dying then."""
        stdout, _ = self.process.communicate()
        deadline = time.monotonic() + DYING_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return stdout


@contextmanager
def demo(out: Path) -> Iterator[Demo]:
    """Nothing of it is left after the block, however the block ends."""
    started = Demo(out)
    try:
        yield started
    finally:
        started.process.kill()
        while left := started.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        started.process.wait()
        started.stdout.close()


@pytest.mark.timeout(900)
def test_a_short_demo_trains_reports_and_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with demo(out) as running:
        stdout = running.end()
        left = running.processes()
    assert running.process.returncode == 0, stdout
    assert left == {}
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 2
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


@in_the_long_round
@pytest.mark.timeout(600)
def test_an_interrupted_demo_ends_what_it_started(tmp_path: Path) -> None:
    """Interrupted in the start of its engines, which are processes of processes."""
    with demo(tmp_path / "demo") as running:
        while not running.starts_an_engine():
            assert running.process.poll() is None, "it has ended of itself"
            time.sleep(0.1)
        running.process.send_signal(signal.SIGINT)
        stdout = running.end()
        left = running.processes()
    assert running.process.returncode == 130
    assert "interrupted" in stdout
    assert left == {}
