"""What cores do while a trainer takes a step: pytest tests/benchmarks/test_trainer_profile.py"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.trainer_profile import __main__ as profile
from benchmarks.trainer_profile.arms import Arm
from benchmarks.trainer_profile.clocks import Clocks, Look, Ran
from benchmarks.trainer_profile.growth import exponent
from benchmarks.trainer_profile.pairs import Pair
from benchmarks.trainer_profile.steps import ratios
from tests.rounds import in_the_long_round
from tests.trainer.learner.tiny_student import write_tiny_student
from tests.trainer.settings.smallest_config import SMALLEST

AS_CONFIGURED = Arm(sampler_cores=None, teacher_cores=None)
TEACHER = 'engine = "hf"\nmax_k = 8\nself_test = false\n'
BUSY = "import sys\nfor line in sys.stdin:\n    print(sum(range(3_000_000)), flush=True)"


def whole(process: int, thread: int, ran: Ran) -> str:
    return "all"


def test_between_two_looks_a_thread_goes_on_evenly() -> None:
    clocks = Clocks({})
    for at, ran in ((10.0, 1.0), (12.0, 2.0), (14.0, 2.0)):
        clocks.looks.append(Look(at, {(1, 1): Ran(ran, 10 * ran, 0)}))
    assert clocks.spent(10.0, 14.0, whole)["all"] == pytest.approx((1.0, 10.0))
    assert clocks.spent(11.0, 13.0, whole)["all"] == pytest.approx((0.5, 5.0))
    assert clocks.spent(12.0, 13.5, whole)["all"] == pytest.approx((0.0, 0.0))


def test_a_thread_that_is_new_counts_from_nought() -> None:
    clocks = Clocks({})
    clocks.looks.append(Look(0.0, {(1, 1): Ran(5.0, 0.0, 0)}))
    clocks.looks.append(Look(1.0, {(1, 1): Ran(5.5, 0.0, 0), (1, 2): Ran(0.25, 0.0, 1)}))
    assert clocks.spent(0.0, 1.0, whole)["all"][0] == pytest.approx(0.75)


def test_the_processor_time_of_a_process_is_seen_from_outside() -> None:
    """Of two that were started alike, the one that computes; never more than the time that passed
    on one core."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([sys.executable, "-c", BUSY], **pipes) as busy,  # type: ignore[call-overload]
        subprocess.Popen([sys.executable, "-c", BUSY], **pipes) as idle,  # type: ignore[call-overload]
    ):
        for each in (busy, idle):  # both have begun
            each.stdin.write(b"\n")
            each.stdin.flush()
            each.stdout.readline()
        clocks = Clocks({"busy": busy.pid, "idle": idle.pid})
        start = time.monotonic()
        with clocks.running():
            for _ in range(3):
                busy.stdin.write(b"\n")
                busy.stdin.flush()
                busy.stdout.readline()
        end = time.monotonic()
        spent = clocks.spent(start, end, lambda process, *_: clocks.names[process])
        for each in (busy, idle):
            each.stdin.close()
    assert spent["busy"][0] > spent["idle"][0] >= 0.0
    assert spent["busy"][0] <= clocks.looks[-1].at - clocks.looks[0].at


@in_the_long_round
async def test_a_step_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real trainer and a real teacher, small and by transformers."""
    student = write_tiny_student(tmp_path / "student")
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(10, 20)))
    (tmp_path / "trainer.toml").write_text(SMALLEST)
    (tmp_path / "teacher.toml").write_text(TEACHER)
    pair = Pair(
        config=tmp_path / "trainer.toml",
        teacher_config=tmp_path / "teacher.toml",
        rollouts=2,
        max_tokens=8,
        max_context=64,
        student=student,
        teacher=student,
        train=train,
        changes={
            "drift.k": 4,
            "sampler": {"kind": "hf"},
            "student.device": "cpu",
            "teacher.k": 8,
            "rollout.student_topk": 4,
        },
    )
    monkeypatch.setattr(profile, "ROOT", tmp_path)
    async with profile.running("tiny", pair, AS_CONFIGURED, []) as running:
        step = await running.take("step", rollouts=3, max_tokens=5)
        again = await running.take("rollout")
        idle = await running.take("idle", seconds=0.1)
    assert [phase.name for phase in step.phases] == ["rollout", "learn", "sync", "probe"]
    assert sum(phase.seconds for phase in step.phases) <= step.seconds
    assert 3 <= step.kept <= 15
    learn = step.phase("learn")
    assert learn is not None
    assert {"body, forward", "head, first pass", "losses", "optimiser"} <= set(step.parts)
    assert all(seconds >= 0 for seconds in step.parts.values())
    assert sum(step.parts.values()) <= learn.seconds
    assert learn.ran["trainer: main thread"] > 0
    assert not again.parts.get("optimiser")
    assert [phase.name for phase in again.phases] == ["rollout"]
    assert [phase.name for phase in idle.phases] == ["idle"]
    record = json.loads(json.dumps(step.record()))
    assert len(record["phases"]["learn"]["busy_cores_over_time"]) == 10
    console = Console(record=True, width=120)
    for table in profile.shown("tiny", [step]):
        console.print(table)
    text = console.export_text()
    assert "of it the learner" in text
    assert "teacher: main thread" in text or "trainer: main thread" in text
    assert ratios({"tiny": {"one": [step], "two": [step]}})["tiny_learn_two_over_one"] == 1.0


def test_the_exponent_of_a_power_is_found() -> None:
    assert exponent({size: 3.0 * size**1.5 for size in (8, 16, 64)}) == pytest.approx(1.5)
    assert exponent({8: 2.0, 16: 2.0, 32: 2.0}) == pytest.approx(0.0)
