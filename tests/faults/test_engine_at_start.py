"""vLLM's engine starts while the learner loads and the teacher is asked; none outlives a failure.

Run: python -m pytest tests/faults/test_engine_at_start.py
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from student_trainer.errors import SamplerError, WeightSyncError
from student_trainer.pretrained import load_student
from student_trainer.records import WeightFormat
from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
from tests.cores import own_core
from tests.faults.engine_processes import engines
from tests.faults.trainer_process import trainer
from tests.faults.training_runs import CHECKPOINTS, Run
from tests.rounds import in_the_long_round
from tests.trainer.learner.made_learners import learner_of
from tests.waiting import LIMIT_S, eventually, wait_until
from vllm_process.children import has_engines

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    pytest.mark.timeout(2 * LIMIT_S),
    # vLLM leaves its ZeroMQ context to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]
VLLM = json.dumps({"kind": "vllm", "cpu_cores": own_core(), "enforce_eager": True})


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A teacher that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening


def last_line(run: Run, silent: socket.socket, log: Path, **settings: object) -> str:
    """Of a trainer that fails after its engine has begun; the engine has gone by then."""
    arguments = run.arguments(
        f"127.0.0.1:{silent.getsockname()[1]}",
        sampler=VLLM,
        teacher__connect_timeout_s=3,
        **settings,
    )
    with trainer(arguments, log) as process:
        wait_until(lambda: engines(process.pid) or process.poll() is not None)
        begun = engines(process.pid)
        assert begun, log.read_text()
        code = process.wait(LIMIT_S)
        assert code == (1 if "NotReadyError" in log.read_text() else 2)
        wait_until(lambda: not any(engine.exists() for engine in begun))
    return log.read_text().splitlines()[-1]


@in_the_long_round  # what ends it is what ends it in the next one, later
def test_a_teacher_that_does_not_answer_ends_the_engine_too(
    silent: socket.socket, tmp_path: Path
) -> None:
    line = last_line(Run(tmp_path / "run"), silent, tmp_path / "log")
    assert line.startswith("NotReadyError: ")


def test_a_student_that_cannot_be_loaded_is_told_of_first(
    silent: socket.socket, tmp_path: Path
) -> None:
    """Its engine cannot load it either. Its files are whole, or nothing would have begun."""
    student = shutil.copytree(CHECKPOINTS / "student", tmp_path / "student")
    weights = student / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    save_file(tensors | {name: tensors[name][1:].clone()}, weights, {"format": "pt"})
    run = Run(tmp_path / "run")
    line = last_line(run, silent, tmp_path / "log", student__model=student)
    assert line.startswith(f"CheckpointError: {student}: cannot load a student: ")


def vllm_sampler() -> VllmSampler:
    """Of the playground's student."""
    return VllmSampler(
        model=str(CHECKPOINTS / "student"),
        dtype="float32",
        max_context=64,
        max_num_topk=0,
        max_num_seqs=2,
        stream_interval=1,
        kv_cache_gib=0.1,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        cpu_cores=own_core(),
        seed=0,
    )


@pytest.mark.parametrize(
    "moment",
    [pytest.param("before its engine is there", marks=in_the_long_round), "with its engine"],
)
async def test_a_sampler_that_is_closed_while_it_starts_leaves_no_engine(moment: str) -> None:
    made = vllm_sampler()
    start = asyncio.ensure_future(made.start())
    if moment == "with its engine":
        await eventually(has_engines)
    else:
        await asyncio.sleep(0)
    start.cancel()
    async with asyncio.timeout(LIMIT_S):
        await made.close()
    assert not has_engines()
    with pytest.raises(asyncio.CancelledError):
        await start


async def test_a_load_that_fails_and_an_engine_that_dies_in_one_are_told_apart() -> None:
    model = load_student(
        str(CHECKPOINTS / "student"), dtype=torch.float32, device=torch.device("cpu")
    )
    weights = [*learner_of(model).weights(WeightFormat(as_saved=True))]
    made = vllm_sampler()
    await made.start()
    (engine,) = engines(os.getpid())

    def failing(error: Exception | None) -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights[:3]
        if error is not None:
            raise error
        os.kill(int(engine.name), signal.SIGKILL)
        yield from weights[3:]

    try:
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(WeightSyncError, match=r"^vLLM cannot load .*other"):
                await made.load_weights(iter([("other.weight", torch.ones(1))]))
            with pytest.raises(MemoryError):
                await made.load_weights(failing(MemoryError()))
            with pytest.raises(SamplerError, match="vLLM's engine has died"):
                await made.load_weights(failing(None))
    finally:
        await made.close()
