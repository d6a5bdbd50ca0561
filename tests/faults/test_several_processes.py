"""One run on two processes that torchrun starts, with a real teacher: what it learns, and its end.

Run: python -m pytest tests/faults/test_several_processes.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_records.reading import read_table, steps
from student_trainer import cli
from student_trainer.assembly.spreading import refuse_spread
from student_trainer.errors import ConfigError
from student_trainer.process.ranks import Ranks, joined
from student_trainer.settings.config import load_config
from student_trainer.train_state import complete_checkpoints
from tests.faults import asked_in_learning
from tests.faults.live_server import LiveServer, gone, live_server
from tests.faults.training_runs import CHECKPOINTS, ROOT, Run
from tests.rounds import in_the_long_round
from tests.waiting import LIMIT_S, wait_until

OF_THE_SCHEDULE = {"learning_rate"}
TEACHER = ("teacher_server.cli", "serve", "--engine", "hf", "--model", str(CHECKPOINTS / "teacher"))
SETTINGS: dict[str, Any] = {
    "rollout.student_topk": 16,
    "data.heldout": CHECKPOINTS / "heldout.jsonl",
    "eval.num_prompts": 2,
    "eval.pass_k": 0,
    "eval.teacher_samples": 2,
    "student.device": "cpu",
    "optim.updates_per_epoch": 2,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("teacher")
    with live_server(folder, "--max-context", "512", program=TEACHER) as server:
        yield server


def settings(**changes: Any) -> dict[str, Any]:
    return {name.replace(".", "__"): value for name, value in (SETTINGS | changes).items()}


@contextmanager
def both(
    run: Run, address: str, *flags: str, asked_at_pass: int | None = None, **changes: Any
) -> Iterator[subprocess.Popen[str]]:
    """Two processes of a run, which end with the block; one is asked to stop at this pass of its
    learner."""
    program = "student_trainer.cli" if asked_at_pass is None else asked_in_learning.__name__
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", program, *run.arguments(address, **settings(**changes)), *flags),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        asked_in_learning.PASS: str(asked_at_pass),
    }
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def trainers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that train."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@contextmanager
def training(
    run: Run, address: str, *flags: str, **changes: Any
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Two processes with a step behind them, and the process ids of both."""
    before = len(run.records("step"))
    with both(run, address, *flags, **changes) as process:
        wait_until(lambda: len(run.records("step")) > before or process.poll() is not None)
        pids = trainers_of(process)
        assert len(pids) == 2
        yield process, pids
    assert all(gone(pid) for pid in pids)


def test_two_processes_learn_what_one_does_and_save_at_sigterm(
    teacher: LiveServer, tmp_path: Path
) -> None:
    """The same prompts and seeds, so the same rollouts; and one folder, as one would write it.

    The playground's characters have doubles of nearly one probability: after an update rounding
    decides which of them is said. So the first step is compared, figure by figure.
    """
    torch.set_num_threads(1)
    alone = Run(tmp_path / "alone")
    assert cli.main(alone.arguments(teacher.address, **settings(**{"run.steps": 1}))) == 0
    run = Run(tmp_path / "both")
    changes = {"run.steps": 1000, "eval.every_steps": 1000, "checkpoint.every_steps": 1}
    with training(run, teacher.address, **changes) as (process, _):
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=LIMIT_S)
    first, expected = run.records("step")[0], alone.records("step")[0]
    of_this_start = {n for n in expected if "seconds" in n or n.endswith("_s")}
    for name in expected.keys() - of_this_start - OF_THE_SCHEDULE - {"kind", "sync_gap_nats"}:
        assert first[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
    for found in run.records("step"):
        assert found["rollouts"] == 4
        assert found["updates"] == 4
        assert found["sync_gap_nats"] < 1e-4
    ours, theirs = (r.records("eval")[0]["heldout_reverse_kl"] for r in (run, alone))
    assert ours == pytest.approx(theirs, rel=1e-4)
    weights, others = run.weights(1), alone.weights(1)
    assert weights.keys() == others.keys()
    gap = max(float((weights[name] - others[name]).abs().max()) for name in weights)
    # AdamW divides a gradient by its size: where it is 0 but for rounding, so is the step's sign.
    assert gap <= 2.1 * expected["updates"] * expected["learning_rate"]
    of_step = steps(run.folder / "rollouts")[1]
    assert [path.name for path in of_step] == ["step-000001.parquet", "step-000001.1.parquet"]
    recorded, by_one = (
        read_table(paths, ["index", "response_ids", "weight"])
        for paths in (of_step, steps(alone.folder / "rollouts")[1])
    )
    assert recorded.equals(by_one)
    assert said.count("step   1") == 1
    done = len(run.records("step"))
    saved = run.folder / "checkpoints" / f"step-{done:06d}"
    assert f"SIGTERM: {done} of 1000 steps are saved in {saved}" in said
    assert torch.load(saved / "trainer_state.pt")["step"] == done


@in_the_long_round
def test_a_process_that_dies_ends_the_other_and_the_run_goes_on_to_its_end(
    teacher: LiveServer, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    changes = {"run.steps": 4, "checkpoint.every_steps": 1}
    with training(run, teacher.address, **changes) as (process, pids):
        # A step is recorded before it is saved.
        wait_until(lambda: complete_checkpoints(run.folder / "checkpoints"))
        os.kill(pids[1], signal.SIGKILL)
        said, _ = process.communicate(timeout=LIMIT_S)
    assert "a process that trains with this one has ended" in said
    with both(run, teacher.address, **changes) as process:
        said, _ = process.communicate(timeout=LIMIT_S)
    assert "--resume goes on from" in said
    assert process.returncode != 0
    with both(run, teacher.address, "--resume", **changes) as process:
        said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    assert [step["step"] for step in run.records("step")] == [1, 2, 3, 4]
    assert (run.folder / "student" / "README.md").is_file()


@in_the_long_round
def test_a_step_in_whose_gradient_one_process_gets_sigterm_is_given_up_by_both(
    teacher: LiveServer, tmp_path: Path
) -> None:
    """Of a step each process has two passes; the first ends alone, and has saved by then."""
    run = Run(tmp_path / "run")
    changes = {
        "data.heldout": "null",
        "optim.epochs": 1,
        "optim.updates_per_epoch": 1,
        "optim.micro_batch_tokens": 1,
        "checkpoint.every_steps": "null",
    }
    with both(run, teacher.address, asked_at_pass=3, **changes) as process:
        said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    saved = run.folder / "checkpoints" / "step-000001"
    assert said.count("SIGTERM: ") == 1, said
    assert f"SIGTERM: 1 of 4 steps are saved in {saved}" in said
    assert [step["step"] for step in run.records("step")] == [1]
    assert torch.load(saved / "trainer_state.pt")["step"] == 1


@pytest.mark.parametrize(
    ("given", "world", "message"),
    [
        ("rollout.prompts_per_step=1", 2, r"2 processes, and rollout\.prompts_per_step is 1: each"),
        ("rollout.prompts_per_step=3", 2, "must be a multiple of 2"),
        ('sampler={"kind":"hf_batched","weights":"shared"}', 2, r'sampler\.weights is "shared"'),
        ("optim.kind=adamw_8bit", 2, "optim.kind is 'adamw_8bit'"),
        ("student.device=cuda:1", 2, "student.device is 'cuda:1'"),
    ],
)
def test_settings_that_several_processes_cannot_share_are_refused(
    given: str, world: int, message: str
) -> None:
    config = load_config(ROOT / "configs" / "trainer-demo.toml", [given])
    with pytest.raises(ConfigError, match=message):
        refuse_spread(config, Ranks(world=world))
    refuse_spread(config, Ranks())


def test_an_environment_that_torchrun_did_not_make_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2 and RANK, MASTER_ADDR, MASTER_PORT"):
        joined().__enter__()


def test_others_that_do_not_come_are_an_error_that_names_the_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("student_trainer.process.ranks.RENDEZVOUS_S", 0.2)
    with pytest.raises(ConfigError, match=r"process 0 of 2 has not met the others at 127\.0\.0\.1"):
        joined().__enter__()


def test_what_the_first_process_refuses_ends_all() -> None:
    class Second(Ranks):
        def gathered(self, own: Any) -> list[Any]:
            return [(None, "run.out holds an earlier run"), own]

    with pytest.raises(ConfigError, match=r"process 0 has refused: run\.out holds"):
        Second(rank=1, world=2).agreed(lambda: pytest.fail("only the first decides"))


def test_other_settings_in_one_process_are_named() -> None:
    class Two(Ranks):
        def gathered(self, own: Any) -> list[Any]:
            return [own, own | {"optim.learning_rate": "0.1"}]

    with pytest.raises(ConfigError, match=r"process 1 has other settings .*optim\.learning_rate"):
        Two(world=2).check_same({"optim.learning_rate": "0.2", "run.seed": "1"})
