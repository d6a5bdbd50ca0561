"""kill -9 of vLLM's engine under a run: another one is started, proven, and the run goes on.

Run: FAULT_ROUNDS=long pytest tests/faults/test_kill_sampler.py
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from student_trainer.assembly.evaluating import Evaluator
from student_trainer.assembly.run import assembled
from student_trainer.errors import SamplerError
from student_trainer.rollouts.stream import RolloutStream
from student_trainer.rollouts.weight_sync import WeightSync
from student_trainer.train import train
from tests.cores import own_core
from tests.faults.engine_processes import engines
from tests.rounds import in_the_long_round
from tests.trainer.test_train import InMemoryClient, configured, connect_to, folder, records
from tests.waiting import LIMIT_S

__all__ = ["folder"]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.timeout(3 * LIMIT_S),
    # vLLM leaves its ZeroMQ context to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]
VLLM = json.dumps(
    {"kind": "vllm", "cpu_cores": own_core(), "enforce_eager": True, "kv_cache_gib": 0.25}
)


def kills_at(patch: pytest.MonkeyPatch, owner: type[Any], method: str, *calls: int) -> list[int]:
    """The engine is killed as a method is called, so many times counted from 1; the pids."""
    original, count, killed = getattr(owner, method), 0, list[int]()

    def killing(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            (engine,) = engines(os.getpid())
            killed.append(int(engine.name))
            os.kill(killed[-1], signal.SIGKILL)
        return original(*arguments, **named)

    patch.setattr(owner, method, killing)
    return killed


@in_the_long_round
@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [(RolloutStream, "take", 2), (WeightSync, "push", 2), (Evaluator, "report", 2)],
    ids=["in a step", "in a sync", "in an evaluation"],
)
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_goes_on_with_another_engine(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: type[Any],
    method: str,
    call: int,
    staleness: int,
) -> None:
    connect_to(InMemoryClient(), monkeypatch)
    config = configured(
        folder, f"sampler={VLLM}", f"rollout.max_staleness={staleness}", "eval.pass_k=0"
    )
    with assembled(config) as run:
        killed = kills_at(monkeypatch, owner, method, call)
        train(run)
        (engine,) = engines(os.getpid())
        assert [int(engine.name)] != killed
    assert len(killed) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("vLLM's engine has died: ") == said.count("Another one is started") == 1
    steps = records(config, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["rollouts"] == 6 and step["sync_gap_nats"] < 1e-3 for step in steps)
    assert [record["step"] for record in records(config, "eval")] == [0, 2, 4]


@in_the_long_round
def test_a_second_engine_that_dies_ends_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_to(InMemoryClient(), monkeypatch)
    config = configured(folder, f"sampler={VLLM}", "data.heldout=null")
    with assembled(config) as run:
        killed = kills_at(monkeypatch, RolloutStream, "take", 2, 4)
        with pytest.raises(SamplerError, match=r"vLLM's engine has died: .* after step 1 already"):
            train(run)
    assert len(killed) == 2
    assert engines(os.getpid()) == []
    assert len(records(config, "step")) == 2
