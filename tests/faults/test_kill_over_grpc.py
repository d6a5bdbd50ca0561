"""kill -9 of a trainer with vLLM and a real teacher over gRPC: what goes on is what was saved.

Ten steps of the playground's pair, killed in the sixth or seventh at counted events, mid-save
included (killed_trainer.py). What is in memory before the first step that is done again is the
checkpoint, bit for bit; prompts, seeds and learning rates are those of an undisturbed run. Losses
are not, to the bit, in two undisturbed runs either: the clock decides where appends are cut and
which rows vLLM computes together. With a teacher in memory they are: test_kill_trainer.py.

Run: FAULT_ROUNDS=long pytest -s tests/faults/test_kill_over_grpc.py
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer.recording.json_lines import read_lines
from student_trainer.train_state import STATE_FILE, complete_checkpoints, latest, step_of
from tests.cores import own_core
from tests.faults.killed_trainer import Request, Trainers, trainers
from tests.faults.live_server import live_server
from tests.faults.test_kill_trainer import flat
from tests.faults.training_runs import CHECKPOINTS, Run
from tests.rounds import in_the_long_round
from tests.waiting import LIMIT_S

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(5 * LIMIT_S)]

STEPS, SEED = 10, 21
WINDOW = (5, 7)
"""Steps that are finished at the kill."""
NUM_ROLLOUTS = 8
"""A step."""
UNDISTURBED = ("undisturbed-1", "undisturbed-2", "undisturbed-3")
TEACHER = ("teacher_server.cli", "serve", "--engine", "hf", "--model", str(CHECKPOINTS / "teacher"))
VLLM = {"kind": "vllm", "cpu_cores": own_core(), "enforce_eager": True, "kv_cache_gib": 0.25}
SETTINGS: dict[str, Any] = {
    "run.steps": STEPS,
    "run.texts": NUM_ROLLOUTS,
    "sampler": json.dumps(VLLM),
    "student.device": "cpu",
    "rollout.prompts_per_step": NUM_ROLLOUTS // 2,
    "drift.w_drop": 0.25,
    "data.heldout": CHECKPOINTS / "heldout.jsonl",
    "eval.every_steps": 5,
    "eval.num_prompts": 4,
    "eval.teacher_samples": 1,
    "eval.pass_k": 0,
    "budget": '{"kind":"prune","initial":24,"minimum":16,"maximum":48,"increment":4,"margin":4,'
    '"hit_ratio":0.5,"patience":1}',
    "optim.warmup_steps": 3,
    "optim.weight_decay": 0.1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 2,
    "teacher.connect_timeout_s": 60,
}
LINE = "half of a line of step"
MOMENTS = (
    r"half of trainer_state\.pt",
    r"half of model\.safetensors",
    r"os\.rename /checkpoints/\.step-\d+\.partial",
    r"os\.rename /checkpoints/step-\d+",
    r"os\.remove model\.safetensors",
    LINE,
    "step",
    "forward",
    "append",
    "load_weights",
)
"""Kinds of events, of each of which one kills: a checkpoint that is being written and one that is
being deleted, a record, an update, a gradient, a question to the teacher, weights on their way."""
ROUNDING = 1e-4
"""Of a loss, relative; what is found is printed."""


@dataclass(frozen=True, slots=True, order=True)
class Apart:
    """The largest relative gap between the losses of two runs, in the first so many steps, in which
    both said the same. A draw within rounding of the border between two tokens ends that."""

    gap: float
    num_steps: int

    def __str__(self) -> str:
        return f"{self.gap:.1e} in {self.num_steps} steps"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Runs with one teacher."""

    trainers: Trainers
    folder: Path
    address: str

    def train(self, name: str, *, kill_at: int | None = None, counted: str = ".*") -> int:
        """Begins a run, or goes on with it."""
        settings = {key.replace(".", "__"): value for key, value in SETTINGS.items()}
        words = Run(self.folder / name).arguments(self.address, **settings)
        return self.trainers.run(
            Request(
                arguments=[*words, "--resume", "auto"],
                folder=str(self.folder / name),
                log=str(self.folder / f"log of {name}"),
                kill_at=kill_at,
                counted=counted,
                events=str(self.folder / f"events of {name}"),
                in_memory=False,
                loaded=str(self.folder / f"loaded by {name}"),
                asked=str(self.folder / f"asked by {name}"),
            )
        )

    def steps(self, name: str) -> list[dict[str, Any]]:
        """What a finished run wrote of each."""
        lines = read_lines(self.folder / name / "metrics.jsonl")
        return [line for line in lines if line["kind"] == "step"]

    def whole_lines(self, name: str) -> list[str]:
        """Of metrics.jsonl, which may have half a line after a kill."""
        text = (self.folder / name / "metrics.jsonl").read_text()
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def asked(self, name: str, *, from_step: int = 0) -> list[dict[str, Any]]:
        """What was asked of the sampler, from the file of the last start."""
        text = (self.folder / f"asked by {name}").read_text()
        made = [json.loads(line) for line in text.splitlines()]
        return [asked for asked in made if asked["place"][0] >= from_step]

    def beside(self, name: str) -> dict[str, Any]:
        """What a start had in memory that no checkpoint holds."""
        return dict(json.loads((self.folder / f"loaded by {name}" / "beside.json").read_text()))

    def log(self, name: str) -> str:
        return (self.folder / f"log of {name}").read_text()[-3000:]

    def responses(self, name: str) -> dict[int, list[str]]:
        """Of each step."""
        found: dict[int, list[str]] = {}
        for line in read_lines(self.folder / name / "samples" / "rollouts.jsonl"):
            found.setdefault(line["step"], []).append(line["response"])
        return found

    def apart(self, one: str, other: str) -> Apart:
        said, theirs = self.responses(one), self.responses(other)
        assert said.keys() == theirs.keys() == {*range(1, STEPS + 1)}
        gaps = list[float]()
        for ours, expected in zip(self.steps(one), self.steps(other), strict=True):
            if said[ours["step"]] != theirs[ours["step"]]:
                break
            gaps.append(abs(ours["loss"] - expected["loss"]) / expected["loss"])
        return Apart(gap=max(gaps, default=0.0), num_steps=len(gaps))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """With the runs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("sweep")
    with (
        live_server(folder, "--max-context", "512", program=TEACHER) as teacher,
        trainers() as forked,
    ):
        made = Sweep(forked, folder, teacher.address)
        for name in UNDISTURBED:
            assert made.train(name) == 0, made.log(name)
        yield made


def moment(sweep: Sweep, kind: str) -> int:
    """The number, among the events of a kind, of one in the window."""
    events = json.loads((sweep.folder / f"events of {UNDISTURBED[0]}").read_text())
    finished = counted = 0
    within = list[int]()
    for name in events:
        finished += name == LINE
        if re.fullmatch(kind, name):
            counted += 1
            if WINDOW[0] <= finished < WINDOW[1]:
                within.append(counted)
    assert within, f"no event {kind} among {sorted(set(events))}"
    return random.Random(f"{SEED} {kind}").choice(within)


@in_the_long_round
@pytest.mark.parametrize("kind", MOMENTS)
def test_what_goes_on_is_what_was_saved_and_learns_what_it_would_have(
    sweep: Sweep, kind: str
) -> None:
    name, number = f"killed-{MOMENTS.index(kind)}", moment(sweep, kind)
    assert sweep.train(name, kill_at=number, counted=kind) == -signal.SIGKILL, sweep.log(name)
    done = step_of(latest(sweep.folder / name / "checkpoints"))
    assert WINDOW[0] - 1 <= done < STEPS
    before = sweep.folder / f"saved by {name}"
    shutil.copytree(latest(sweep.folder / name / "checkpoints"), before)
    recorded = [line for line in sweep.whole_lines(name) if json.loads(line)["step"] <= done]
    (sweep.folder / f"asked by {name}").unlink()
    assert sweep.train(name) == 0, sweep.log(name)

    assert_loaded(sweep, name, before, done)
    assert recorded
    assert sweep.whole_lines(name)[: len(recorded)] == recorded
    undisturbed = UNDISTURBED[0]
    rates = [[step["learning_rate"] for step in sweep.steps(n)] for n in (name, undisturbed)]
    assert rates[0] == rates[1]
    left = {path.name for path in (sweep.folder / name / "checkpoints").iterdir()}
    assert left == {f"step-{step:06d}" for step in (STEPS - 1, STEPS)}

    apart = [sweep.apart(name, other) for other in UNDISTURBED]
    spread = [sweep.apart(*pair) for pair in combinations(UNDISTURBED, 2)]
    shown = [", ".join(map(str, each)) for each in (apart, spread)]
    said = f"{kind}, event {number}: from step {done}; apart {shown[0]}; undisturbed {shown[1]}"
    print(f"\n{said}")  # noqa: T201
    assert max(apart).gap <= ROUNDING, said


def assert_loaded(sweep: Sweep, name: str, saved: Path, done: int) -> None:
    """In memory before the first step was what the checkpoint has, and nothing else that counts."""
    loaded = sweep.folder / f"loaded by {name}" / f"step-{done:06d}"
    weights = "model.safetensors"
    assert (loaded / weights).read_bytes() == (saved / weights).read_bytes()
    states = [flat(torch.load(folder / STATE_FILE)) for folder in (loaded, saved)]
    assert states[0] == states[1]
    beside, fresh = sweep.beside(name), sweep.beside(UNDISTURBED[0])
    assert beside["policy_version"] == done
    # Nothing is drawn from it, or a resumed run would draw other numbers.
    assert beside["generator"] == beside["generator_after"] == fresh["generator"]
    assert fresh["generator"] == fresh["generator_after"]
    asked, expected = sweep.asked(name), sweep.asked(UNDISTURBED[0], from_step=done)
    for field in ("place", "prompt", "seed", "version"):
        assert [a[field] for a in asked] == [e[field] for e in expected], field


@in_the_long_round
def test_the_undisturbed_runs_differ_by_rounding_and_move(sweep: Sweep) -> None:
    """In all that is to be the same after a kill."""
    for one, other in combinations(UNDISTURBED, 2):
        assert sweep.apart(one, other).gap <= ROUNDING
        assert sweep.asked(one) == sweep.asked(other)
    steps = sweep.steps(UNDISTURBED[0])
    assert [step["step"] for step in steps] == [*range(1, STEPS + 1)]
    for figure in ("loss", "learning_rate", "grad_norm", "max_tokens", "staleness_min_version"):
        assert len({step[figure] for step in steps}) > 1, figure
    assert any(step["truncated_rollouts"] for step in steps)
    newest = complete_checkpoints(sweep.folder / UNDISTURBED[0] / "checkpoints")[-1]
    assert torch.load(newest / STATE_FILE)["stream"]["steps"] == STEPS
