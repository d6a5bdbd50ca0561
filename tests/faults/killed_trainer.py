"""`student-trainer` in real processes that kill themselves, by SIGKILL, at a counted event.

An event is whatever could leave something half done: a file below the run's folder is opened for
writing, renamed or deleted, a file of tensors or a line is half written, an update begins, the
teacher is asked, weights are sent. The processes are forked from one that has imported everything
and done nothing; the teacher is in memory, or another process.

Run as: python -m tests.faults.killed_trainer, requests on stdin.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# An engine of vLLM imports this module too: nothing is imported here that it has no use for.
ROOT = Path(__file__).resolve().parents[2]
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
"""Of files, as Python's audit names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One run of the trainer."""

    arguments: Sequence[str]
    folder: str
    """What it writes to."""
    log: str
    kill_at: int | None
    """The event with which it is killed, from 1 on; None: it runs to its end."""
    counted: str = ".*"
    """Those that are counted; what of the others happens the clock may decide."""
    events: str | None = None
    """File for the names of all its events, where it runs to its end."""
    in_memory: bool = True
    """The teacher; else it is where the arguments say."""
    loaded: str | None = None
    """Folder for what is in memory before its first step."""
    asked: str | None = None
    """File for what its sampler is asked for, a line a rollout."""


class Trainers:
    """Runs them, one after another."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, request: Request) -> int:
        """Its exit code; minus the signal that ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that others are forked from has ended"
        return int(answer)


@contextmanager
def trainers() -> Iterator[Trainers]:
    """From one process, which ends with the block."""
    command = [sys.executable, "-m", "tests.faults.killed_trainer"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Trainers(process)
        assert process.stdin is not None
        process.stdin.close()


class Events:
    """What has happened in this process, and the one with which it ends."""

    def __init__(self, folder: str, kill_at: int | None, counted: str) -> None:
        self.names: list[str] = []
        self._folder = folder
        self._kill_at = kill_at
        self._counted = counted
        self._num_counted = 0
        self._deletes_ours = False

    def happens(self, name: str, before_the_end: Callable[[], None] = lambda: None) -> None:
        """One more; the last does what is to be left behind and kills."""
        self.names.append(name)
        self._num_counted += re.fullmatch(self._counted, name) is not None
        if self._num_counted == self._kill_at:
            self._kill_at = None
            before_the_end()
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit of what it asks the system for."""
        if event == "shutil.rmtree":
            self._deletes_ours = os.fspath(arguments[0]).startswith(self._folder)
        if event not in CHANGES or (event == "open" and not _writes(*arguments[1:3])):
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
        within = path.startswith(self._folder)
        # A tree is deleted from within: names alone, below an open folder.
        is_bare = event in ("os.remove", "os.rmdir") and arguments[-1] != -1
        in_a_tree = is_bare and self._deletes_ours
        if within or in_a_tree:
            self.happens(f"{event} {path.removeprefix(self._folder)}")

    def counts(self, owner: Any, name: str) -> None:
        """A call of a function is an event."""
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            self.happens(name)
            return original(*arguments, **named)

        setattr(owner, name, counted)

    def halves(self, owner: Any, name: str) -> None:
        """What a function writes, to the path that is its second argument, is half there."""
        original = getattr(owner, name)

        def half_done(content: Any, path: Any, *arguments: Any, **named: Any) -> None:
            original(content, path, *arguments, **named)
            size = os.path.getsize(path)
            self.happens(f"half of {Path(path).name}", lambda: os.truncate(path, size // 2))

        setattr(owner, name, half_done)


def _writes(mode: str | None, flags: int) -> bool:
    return any(letter in (mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR) > 0


def _watch(events: Events) -> None:
    """The places where a run may end."""
    import torch
    from transformers import modeling_utils

    from student_trainer.learner.batch import Batch
    from student_trainer.learner.optim import Optimizer
    from student_trainer.recording.json_lines import JsonLines
    from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
    from teacher_client.client import TeacherSession
    from tests.trainer.test_train import ModelSession

    events.counts(Optimizer, "step")
    events.counts(Batch, "forward")
    events.counts(ModelSession, "append")
    events.counts(TeacherSession, "append")
    events.counts(VllmSampler, "load_weights")
    events.halves(torch, "save")
    events.halves(modeling_utils, "safe_save_file")
    write = JsonLines._write

    def half_a_line(lines: JsonLines, kind: str, step: int, values: Any) -> None:
        write(lines, kind, step, values)
        path = lines._metrics.name
        size = os.path.getsize(path)
        events.happens(f"half of a line of {kind}", lambda: os.truncate(path, size - 10))

    JsonLines._write = half_a_line  # type: ignore[method-assign]
    sys.addaudithook(events.audited)


def _teach_in_memory() -> None:
    from student_trainer.assembly import teachers
    from tests.trainer.test_train import InMemoryClient

    async def connect(*_: object) -> InMemoryClient:
        return InMemoryClient()

    teachers.connect = connect  # type: ignore[assignment]


def _keep_what_is_loaded(folder: Path) -> None:
    """A checkpoint of what is in memory as the loop begins, and what no checkpoint holds."""
    import torch

    from student_trainer import train as loop
    from student_trainer.assembly.checkpoints import train_state
    from student_trainer.assembly.run import Run

    train = loop.train

    def kept(run: Run) -> None:
        again = train_state(run.config, run.learner, run.stream)
        again._folder, again.step = folder, run.state.step
        again.save()
        beside = {
            "policy_version": run.stream.policy_version,
            "generator": torch.get_rng_state().tolist(),
        }
        train(run)
        beside["generator_after"] = torch.get_rng_state().tolist()
        (folder / "beside.json").write_text(json.dumps(beside))

    loop.train = kept


def _keep_what_is_asked(path: Path) -> None:
    """Place, prompt, seed, length and policy of every rollout of the loop."""
    from student_trainer.rollouts.stream import RolloutStream

    rollout = RolloutStream._rollout

    def kept(stream: RolloutStream, *asked: Any) -> Any:
        step, index, prompt, options, version = asked
        line = {
            "place": [step, index],
            "prompt": prompt.token_ids.tolist(),
            "seed": options.seed,
            "max_tokens": options.max_tokens,
            "version": version,
        }
        with path.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        return rollout(stream, *asked)

    RolloutStream._rollout = kept  # type: ignore[assignment]


def _train(request: Request) -> int:
    """In a process of its own."""
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    import torch

    from student_trainer import cli

    torch.set_num_threads(1)
    if request.in_memory:
        _teach_in_memory()
    if request.loaded is not None:
        _keep_what_is_loaded(Path(request.loaded))
    if request.asked is not None:
        _keep_what_is_asked(Path(request.asked))
    events = Events(request.folder, request.kill_at, request.counted)
    _watch(events)
    code = cli.main([*request.arguments])
    if request.events is not None:
        Path(request.events).write_text(json.dumps(events.names))
    return code


def serve() -> None:
    """Forks a process for each request, and answers with how it ended."""
    import student_trainer.assembly.run  # noqa: F401
    import tests.trainer.test_train  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _train(Request(**json.loads(line)))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    serve()
