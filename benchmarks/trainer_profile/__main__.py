"""What each core does while the trainer takes a step, phase by phase, and inside the learner.

    python -m benchmarks.trainer_profile --json PATH              both pairs, as shipped
    python -m benchmarks.trainer_profile --pairs playground --arms apart both shared
    python -m benchmarks.trainer_profile --growth                 how each phase grows
    python -m benchmarks.trainer_profile --growth smollm2         the same of a real shape

A teacher server and a trainer run as processes of their own; an arm says on which cores, and how
their threads wait for each other. What they do is read from /proc: processor time by process and
thread, and how long they waited for a core. The matrix rate that the machine reaches is measured
before and after. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import processes
from benchmarks.measuring import PAUSE_S, turned, wide_console
from benchmarks.provenance import ROOT, provenance
from benchmarks.trainer_profile.arms import ARMS, Arm
from benchmarks.trainer_profile.clocks import Clocks
from benchmarks.trainer_profile.growth import growth, growth_table
from benchmarks.trainer_profile.pairs import GROWING, PAIRS, Pair
from benchmarks.trainer_profile.steps import Step, matrix_rate, ratios, shown
from student_trainer.process.writing import write_whole
from vllm_process.cores import wait_briefly

STEPS = 1000
"""That a run is told to have; it takes as many as it is asked for."""
TRAINER, TEACHER = "trainer", "teacher"


class Pairing:
    """A trainer and its teacher, running."""

    def __init__(self, trainer: processes.Answering, clocks: Clocks) -> None:
        self._trainer = trainer
        self.clocks = clocks

    async def take(self, what: str, **question: float) -> Step:
        """One answer, and what the processes did meanwhile."""
        self.clocks.looks.clear()
        with self.clocks.running():
            answer = await self._trainer.ask({"do": what, **question})
        return Step.of(answer, self.clocks)


@asynccontextmanager
async def running(
    name: str, pair: Pair, arm: Arm, changes: Sequence[str]
) -> AsyncIterator[Pairing]:
    """Both, from their start to their end."""
    out = ROOT / "runs" / "bench-trainer-profile" / name
    out.mkdir(parents=True, exist_ok=True)
    ready = out / "teacher.ready.json"
    ready.unlink(missing_ok=True)
    command = ["nice", "-n", str(arm.teacher_niceness)] if arm.teacher_niceness else []
    command += [sys.executable, "-m", "teacher_server.cli", "serve", *pair.teacher_words()]
    command += ["--ready-file", str(ready), "--grpc-port", "0", "--http-port", "0"]
    if arm.teacher_cores is not None:
        command += ["--cpu-cores", arm.teacher_cores]
    async with AsyncExitStack() as stack:
        teacher = stack.enter_context(
            processes.child(f"profile-teacher-{name}", command, env=arm.environment)
        )
        await teacher.until(ready.exists)
        endpoint = json.loads(ready.read_text())["grpc_address"]
        settings = pair.settings(out / "run", endpoint, STEPS) | arm.settings()
        words = [str(pair.config), *(f"{key}={json.dumps(to)}" for key, to in settings.items())]
        trainer = processes.Answering()
        stack.push_async_callback(trainer.close)
        child = [sys.executable, "-m", "benchmarks.trainer_profile.child", *words, *changes]
        await trainer.start(f"profile-trainer-{name}", child, arm.environment)
        roots = {TRAINER: trainer.pid, TEACHER: teacher.process.pid}
        yield Pairing(trainer, Clocks(roots))


async def measure(
    arguments: argparse.Namespace, pair_name: str, console: Console
) -> dict[str, list[Step]]:
    """Steps of every arm of a pair, in turns; the first of each is not counted."""
    found: dict[str, list[Step]] = {name: [] for name in arguments.arms}
    groups = [[name] for name in found] if arguments.one_at_a_time else [list(found)]
    for round_ in range(arguments.rounds):
        for group in turned([*map(tuple, groups)], round_):
            async with AsyncExitStack() as stack:
                made = [
                    running(f"{pair_name}-{name}", PAIRS[pair_name], ARMS[name], arguments.set)
                    for name in group
                ]
                started = await asyncio.gather(*map(stack.enter_async_context, made))
                alive = dict(zip(group, started, strict=True))
                for step in range(-1, arguments.steps):
                    for name in turned(list(alive), max(step, 0)):
                        await asyncio.sleep(PAUSE_S)
                        taken = await alive[name].take(arguments.do)
                        console.print(f"{pair_name} {name} {step + 1}: {taken}", highlight=False)
                        if step >= 0:
                            found[name].append(taken)
                if arguments.idle_s:
                    for name, pairing in alive.items():
                        rest = await pairing.take("idle", seconds=arguments.idle_s)
                        console.print(f"{pair_name} {name} idle: {rest}", highlight=False)
                        found[name].append(rest)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "bench-trainer-profile.json"
    made.add_argument("--json", type=Path, default=default, metavar="PATH", help="results")
    made.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    made.add_argument("--arms", nargs="+", choices=ARMS, default=["shipped"])
    made.add_argument(
        "--do", choices=("step", "rollout"), default="step", help="or its first phase"
    )
    made.add_argument("--steps", type=int, default=5, help="of each arm, after one to warm up")
    made.add_argument("--rounds", type=int, default=1, help="starts of each arm, or growths")
    made.add_argument("--one-at-a-time", action="store_true", help="for want of memory")
    made.add_argument("--idle-s", type=float, default=0.0, help="look on after the last step, too")
    made.add_argument("--set", action="append", default=[], help="trainer setting, key=value")
    made.add_argument(
        "--growth",
        nargs="?",
        choices=GROWING,
        const="random",
        help="by phase, instead; of two layers unless named",
    )
    made.add_argument("--quick", action="store_true", help="one step of the playground")
    return made


async def main(words: Sequence[str] | None = None, console: Console | None = None) -> int:
    arguments, console = parser().parse_args(words), console or wide_console()
    if arguments.quick:
        arguments.pairs, arguments.steps = ["playground"], 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wait_briefly()
    rates = [await asyncio.to_thread(matrix_rate)]
    began = time.monotonic()
    found: Mapping[str, Mapping[str, list[Step]]] = {}
    grown: dict[str, Any] = {}
    if arguments.growth:
        growing, say = GROWING[arguments.growth], partial(console.print, highlight=False)
        arm = ARMS[arguments.arms[0]]
        async with running("growth", growing.pair, arm, arguments.set) as pairing:
            grown = await growth(pairing.take, growing.axes, repeats=arguments.rounds, said=say)
        console.print(growth_table(grown))
    else:
        found = {name: await measure(arguments, name, console) for name in arguments.pairs}
    rates.append(await asyncio.to_thread(matrix_rate))
    record: dict[str, Any] = {
        "made": provenance(),
        "settings": {
            name: getattr(arguments, name)
            for name in ("arms", "do", "steps", "rounds", "set", "growth")
        },
        "matrix_gflop_per_s": [round(rate, 1) for rate in rates],
        "took_s": round(time.monotonic() - began, 1),
        "ratios": ratios(found),
        "growth": grown,
        "pairs": {
            pair: {arm: [step.record() for step in steps] for arm, steps in arms.items()}
            for pair, arms in found.items()
        },
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.json, json.dumps(record, indent=1) + "\n")
    for pair, arms in found.items():
        for arm, steps in arms.items():
            for table in shown(f"{pair}, {arm}", steps):
                console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(processes.run(main()))
