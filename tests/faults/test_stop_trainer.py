"""SIGTERM ends a run within its orchestrator's patience, and the line it prints goes on.

Real processes: the trainer with the reference sampler, a fake teacher. What happens at each moment
of a step is in tests/trainer/test_stopping.py. Run: pytest tests/faults/test_stop_trainer.py
"""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from student_trainer.process.stopping import EXIT_TERMINATED
from student_trainer.train_state import complete_checkpoints, step_of
from tests.cores import own_core
from tests.faults.engine_processes import engines
from tests.faults.forked_processes import ForkedTeacher
from tests.faults.trainer_process import SAVING, started, trainer
from tests.faults.training_runs import FAKE, ROOT, Run, until_scored
from tests.rounds import in_the_long_round
from tests.waiting import eventually, wait_until

pytestmark = pytest.mark.e2e
NOTHING = {"checkpoint__every_steps": "null"}
WAIT_S = 120
"""For a process to end by itself: it is killed then, and the test fails."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedTeacher]:
    """A fake teacher with the playground's vocabulary."""
    made = ForkedTeacher(tmp_path_factory.mktemp("teacher"), **FAKE)
    made.start()
    try:
        asyncio.run(made.until_ready())
        yield made
    finally:
        made.kill()


def finished_steps(run: Run, process: subprocess.Popen[bytes], number: int) -> None:
    """Returns once the run has recorded so many."""

    def there() -> bool:
        assert process.poll() is None, "ended before it was told to"
        return len(run.records("step")) >= number

    asyncio.run(eventually(there))


def said_command(log: Path) -> list[str]:
    """The command that the last line said by the process holds."""
    return shlex.split(log.read_text().splitlines()[-1])


@pytest.mark.timeout(400)
def test_a_run_stopped_in_a_rollout_goes_on_by_the_line_it_printed(
    teacher: ForkedTeacher, tmp_path: Path
) -> None:
    straight = Run(tmp_path / "straight").train(teacher.address)
    run, log = Run(tmp_path / "run"), tmp_path / "log"
    # Sums depend on the number of threads in their last bit.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with trainer(run.arguments(teacher.address, **NOTHING), log, **threads) as process:
        finished_steps(run, process, 2)
        asyncio.run(until_scored(teacher, 20))
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == EXIT_TERMINATED == 143
    (saved,) = complete_checkpoints(run.folder / "checkpoints")
    done = step_of(saved)
    assert 2 <= done < 4, "the signal came after the run"
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["finished"], summary["steps_done"], summary["steps_planned"]) == (
        False,
        done,
        4,
    )
    assert f"SIGTERM: {done} of 4 steps are saved in {saved}; go on with" in log.read_text()
    assert "Traceback" not in log.read_text()

    command = said_command(log)
    assert command[-1] == "--resume"
    with started(command, log, **threads) as process:
        assert process.wait(WAIT_S) == 0, log.read_text()
    assert json.loads((run.folder / "summary.json").read_text())["finished"] is True
    assert [record["step"] for record in run.records("step")] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "learning_rate", "kept_tokens", "reverse_kl"):
        one, other = ([r[name] for r in made.records("step")] for made in (run, straight))
        assert one == other, name
    trained = load_file(run.folder / "student" / "model.safetensors")
    for name, tensor in straight.weights(4).items():
        assert torch.equal(trained[name], tensor), name


@in_the_long_round
@pytest.mark.timeout(400)
def test_a_second_signal_ends_the_run_at_once(teacher: ForkedTeacher, tmp_path: Path) -> None:
    run, log = Run(tmp_path / "run"), tmp_path / "log"
    arguments = run.arguments(teacher.address, **NOTHING)
    with trainer(arguments, log, TRAINER_SAVES_FOR_S="1000") as process:
        finished_steps(run, process, 1)
        process.send_signal(signal.SIGTERM)
        # The checkpoint is being written, for longer than anybody waits.
        asyncio.run(eventually(lambda: any(run.folder.rglob(SAVING))))
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == -signal.SIGTERM
    assert complete_checkpoints(run.folder / "checkpoints") == []
    assert json.loads((run.folder / "summary.json").read_text())["finished"] is False


@in_the_long_round
@pytest.mark.timeout(400)
def test_a_run_that_waits_for_its_lost_teacher_stops_too(
    teacher: ForkedTeacher, tmp_path: Path
) -> None:
    run, log = Run(tmp_path / "run"), tmp_path / "log"
    with trainer(run.arguments(teacher.address, **NOTHING), log) as process:
        finished_steps(run, process, 1)
        teacher.kill()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == EXIT_TERMINATED
    (saved,) = complete_checkpoints(run.folder / "checkpoints")
    assert step_of(saved) == len(run.records("step"))
    teacher.start()
    asyncio.run(teacher.until_ready())


@in_the_long_round
@pytest.mark.timeout(400)
def test_a_run_stopped_before_its_first_step_says_that_nothing_is_saved(tmp_path: Path) -> None:
    run, log = Run(tmp_path / "run"), tmp_path / "log"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(WAIT_S)
        arguments = run.arguments(f"127.0.0.1:{silent.getsockname()[1]}")
        arguments += ["--set", "teacher.connect_timeout_s=1000"]
        with trainer(arguments, log) as process:
            # It has connected, and waits for an answer that does not come.
            connection, _ = silent.accept()
            connection.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == EXIT_TERMINATED
    assert "SIGTERM: no finished step is saved; the run begins again with" in log.read_text()
    assert said_command(log)[-len(arguments) :] == arguments


@in_the_long_round
@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_a_run_stopped_while_its_engine_starts_leaves_no_engine(
    teacher: ForkedTeacher, tmp_path: Path
) -> None:
    run, log = Run(tmp_path / "run"), tmp_path / "log"
    sampler = json.dumps({"kind": "vllm", "cpu_cores": own_core(), "enforce_eager": True})
    with trainer(run.arguments(teacher.address, sampler=sampler), log) as process:
        wait_until(lambda: engines(process.pid))
        started_engines = engines(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == EXIT_TERMINATED
        wait_until(lambda: not any(engine.exists() for engine in started_engines))
    assert "SIGTERM: no finished step is saved" in log.read_text()
    assert "Traceback" not in log.read_text()


SIGNAL_FOR_ANOTHER_THREAD = """
import asyncio, signal, threading
from student_trainer.process.stopping import Stopped, StopRequest
from student_trainer.rollouts.stream import LoopThread

stop, waiting = StopRequest(), threading.Event()

async def never_answered():
    waiting.set()
    await asyncio.sleep(3600)

def take_the_signal():
    waiting.wait()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=take_the_signal, daemon=True).start()
with stop.on_sigterm(lambda: ""):
    try:
        with stop.may_give_up():
            LoopThread().run(never_answered())
    except Stopped:
        print("stopped")
"""


def test_a_signal_that_does_not_wake_the_main_thread_stops_it() -> None:
    """The system may hand it to another thread, or to the main one just before that sleeps."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_FOR_ANOTHER_THREAD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.stdout == "stopped\n", done.stderr
