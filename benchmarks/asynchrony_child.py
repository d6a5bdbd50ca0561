"""Our trainer on one core, a teacher being up: every step, and the student that it ends with.

    python -m benchmarks.asynchrony_child CONFIG CORE STUDENT [KEY=VALUE ...]

One JSON object a step, with seconds since the step before; the sampler's engine is on the cores
that its settings name.
"""

# ruff: noqa: E402 - how threads wait is said before torch is loaded, as the command line does

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from vllm_process.cores import wait_briefly

wait_briefly()

from benchmarks.trainers.task import telling
from student_trainer.assembly.run import assembled
from student_trainer.settings.config import load_config
from student_trainer.train import take_step


def stay_on(core: int) -> None:
    """All threads of this process, and those that they will start; no process that it has begun."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def main() -> None:
    config = load_config(Path(sys.argv[1]), sys.argv[4:])
    with telling() as tell, assembled(config, overwrite=True) as run:
        stay_on(int(sys.argv[2]))
        for step in range(config.run.steps):
            started = time.monotonic()
            report = take_step(run, step)
            run.stream.settle()
            run.state.step = report.step
            spent, learning, generation = report.seconds, report.learning, report.generation
            assert learning is not None
            assert generation is not None
            tell(
                "step",
                step=report.step,
                seconds=time.monotonic() - started,
                generate=(spent.generate or 0.0) + (spent.teacher_wait or 0.0),
                learn=spent.learn,
                sync=spent.sync,
                tokens=round(learning.loss_tokens),
                staleness=step - generation.staleness_min_version,
            )
        run.learner.save(Path(sys.argv[3]))
        tell("done")


if __name__ == "__main__":
    main()
