"""The trainer of `make demo`: the product's loop, with what a demo adds to it.

The sampler starts before the teacher is asked for, so that both engines load at the same time. The
teacher is evaluated beside the student's first evaluation, which keeps one core busy: greedily, on
the same problems, by transformers, because the sampler's engine cannot take a model of another
number of layers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo import POLL_S, ROOT, TRAINER_CONFIG, address_in
from student_trainer.errors import TrainerError
from teacher_client import AccessError
from teacher_wire.errors import TeacherError
from vllm_process.imports import uncollected

if TYPE_CHECKING:
    from student_trainer.records import Prompt

TEACHER = ROOT / "examples" / "playground" / "checkpoints" / "teacher"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and reports; what is wrong is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", action="append", default=[], help="trainer setting, key=value")
    parser.add_argument("--teacher-ready-file", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        out = distil(
            arguments.set, arguments.teacher_ready_file, Console(), overwrite=arguments.overwrite
        )
        return report(out)
    except (TrainerError, TeacherError, AccessError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def distil(
    overrides: list[str], teacher_ready_file: Path, console: Console, *, overwrite: bool
) -> Path:
    """Trains; returns the run's folder. Raises TrainerError and TeacherError."""
    with ExitStack() as stack:
        with waiting(console, "sampler: loading vLLM and the student"), uncollected():
            from vllm_process.cores import wait_briefly

            wait_briefly()
            from student_trainer.assembly.run import assembled
            from student_trainer.assembly.sampling import running_sampler
            from student_trainer.recording.run_folder import refuse_occupied
            from student_trainer.settings.config import load_config
            from student_trainer.train import train

            config = load_config(TRAINER_CONFIG, overrides)
            refuse_occupied(config.run.out, overwrite=overwrite)
            running = stack.enter_context(running_sampler(config, config.student.model))
        with waiting(console, "teacher server: loading and self-test"):
            while not teacher_ready_file.exists():
                time.sleep(POLL_S)
        endpoint = f'teacher.endpoints=["{address_in(teacher_ready_file)}"]'
        config = load_config(TRAINER_CONFIG, [*overrides, endpoint])
        # A run has files to remove; what only loads may be ended as it is.
        signal.signal(signal.SIGTERM, _interrupt)
        with assembled(config, overwrite=overwrite, running=running) as run:
            measuring = run.running.loop.start(
                asyncio.to_thread(teacher_accuracy, run.problems.heldout)
            )
            train(run)
            run.finish()
            accuracy = measuring.result()
    (config.run.out / "teacher_eval.json").write_text(json.dumps({"accuracy": accuracy}) + "\n")
    return config.run.out


def teacher_accuracy(prompts: Sequence[Prompt]) -> float:
    """Share of the problems that the teacher solves greedily without one wrong step.

    On one core: the sampler has the other.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from examples.playground.evaluation import accuracy, respond
    from examples.playground.task import parse_prompt

    problems = [parse_prompt(prompt.text) for prompt in prompts]
    model = Qwen3ForCausalLM.from_pretrained(TEACHER)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        responses = respond(model, tokenizer, problems, greedy=True)
    finally:
        torch.set_num_threads(num_threads)
    return accuracy(problems, responses)[1]


def report(out: Path) -> int:
    """Table, summary and plot of a run, as the command makes them; returns its exit code."""
    from student_trainer.cli import main as student_trainer

    return student_trainer(["report", str(out), "--teacher-eval", str(out / "teacher_eval.json")])


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """A bar for as long as the block takes; a line where the output is not a terminal."""
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield
        progress.update(task, total=1, completed=1)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
