"""Several processes take the step of one: pytest tests/trainer/learner/test_data_parallel.py

Two gloo processes, each with half of the sequences, against one process with all of them.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from student_trainer.learner.optim import Optimizer
from student_trainer.losses.objective import StepSums, sum_over_processes
from student_trainer.losses.weight_choice import BlockGate, PruneWeight
from student_trainer.records import Rollout
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student
from tests.trainer.made_rollouts import random_rollout
from tests.waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[3]
LENGTHS = (5, 11, 2, 7, 1, 9)
OURS = {0: LENGTHS[:2], 1: LENGTHS[2:]}
"""Of unequal numbers of sequences and tokens."""


def all_rollouts() -> list[Rollout]:
    rng = np.random.default_rng(0)
    return [random_rollout(rng, num_response=n, masked=int(n > 6)) for n in LENGTHS]


def updated(rollouts: list[Rollout]) -> dict[str, Any]:
    """One update on each of two steps: the first's gradient and weights, the last's metrics."""
    student = tiny_student()
    optimizer = Optimizer(
        student,
        learning_rate=1e-3,
        final_learning_rate=1e-3,
        warmup_updates=0,
        total_updates=10,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        max_grad_norm=1.0,
    )
    learner = learner_of(
        student,
        optimizer,
        weights=[PruneWeight(w_drop=0.1), BlockGate(block_size=4)],
        micro_batch_tokens=30,
    )
    learner.learn(rollouts, 0)
    moments = optimizer.state()["moments"].values()
    gradient = torch.cat([m["exp_avg"].flatten() for m in moments])
    weights = torch.cat([p.detach().flatten() for p in student.parameters()])
    report = learner.learn(rollouts, 1)
    return {
        "weights": weights,
        "gradient": gradient,
        "metrics": {name: value for name, value in asdict(report).items() if value is not None},
    }


def worker(rank: int, folder: Path) -> None:
    """One of two processes; writes what it found to the folder."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(OURS)
    )
    first = len(OURS[0])
    rollouts = all_rollouts()[first:] if rank else all_rollouts()[:first]
    found = updated(rollouts)
    # A parameter that this process alone did not use, and one that none did.
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    module = torch.nn.Module()
    module.parts = torch.nn.ParameterList(parameters)
    optimizer = Optimizer(
        module,  # type: ignore[arg-type]
        learning_rate=1e-2,
        final_learning_rate=1e-2,
        warmup_updates=0,
        total_updates=10,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1e9,
    )
    parameters[0].grad = torch.tensor([1.0, float(rank)])
    if rank == 1:
        parameters[1].grad = torch.tensor([3.0, 4.0])
    found["norm"] = optimizer.step(0.5)
    found["parts"] = torch.stack([p.detach() for p in parameters])
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def both_workers(folder: Path) -> None:
    """Forked, so that the imports are made once."""
    torch.set_num_threads(1)
    multiprocessing.start_processes(worker, (folder,), nprocs=len(OURS), start_method="fork")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.trainer.learner.test_data_parallel import both_workers\n"
        "both_workers(Path(sys.argv[1]))"
    )
    # Not forked from this process, which may have threads.
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in OURS]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process with all sequences finds."""
    return updated(all_rollouts())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_two_processes_update_like_one(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert alone["gradient"].norm() > 0
    assert distance(both[0]["gradient"], both[1]["gradient"]) == 0.0
    assert torch.equal(both[0]["weights"], both[1]["weights"])
    # The gradient after clipping: float32 sums in another order.
    assert distance(both[0]["gradient"], alone["gradient"]) < 1e-6
    # AdamW divides a gradient by its size: where it is 0 but for rounding, so is the step's sign.
    clear = alone["gradient"].abs() > 1e-6
    assert clear.float().mean() > 0.5
    found, expected = both[0]["weights"][clear], alone["weights"][clear]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)
    before = torch.cat([p.detach().flatten() for p in tiny_student().parameters()])
    assert (expected - before[clear]).abs().min() > 5e-4


def test_two_processes_log_what_one_does(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected = alone["metrics"]
    assert expected["loss_tokens"] == sum(LENGTHS) - sum(n > 6 for n in LENGTHS)
    assert expected["weight_min"] < expected["weight_mean"] < expected["weight_max"]
    for found in both:
        assert found["metrics"] == pytest.approx(expected, rel=1e-5)


def test_half_of_the_sequences_alone_update_otherwise(both: list[dict[str, Any]]) -> None:
    half = updated(all_rollouts()[: len(OURS[0])])
    assert distance(both[0]["gradient"], half["gradient"]) > 1e-2


def test_a_parameter_that_one_process_left_out_gets_the_others_gradient(
    both: list[dict[str, Any]],
) -> None:
    for found in both:
        # Sums 2, 1 and 3, 4, halved; the norm of all four.
        assert found["norm"] == pytest.approx(0.5 * 30**0.5)
        # The first step of AdamW is the learning rate against the sign; none where unused.
        expected = torch.tensor([[0.99, 0.99], [0.99, 0.99], [1.0, 1.0]])
        assert torch.allclose(found["parts"], expected, atol=1e-6)


def test_one_process_has_its_own_sums() -> None:
    one = torch.ones(())
    sums = StepSums(
        loss_sum=one,
        weight_sum=one,
        num_tokens=one,
        weight_min=one,
        weight_max=one,
        monitor_sums={},
    )
    assert sum_over_processes(sums) is sums
