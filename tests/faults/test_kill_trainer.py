"""kill -9 of a trainer at any moment: what goes on from there is the run that nothing disturbed.

Ten steps with the reference sampler, a teacher in memory, real processes that end by SIGKILL at a
counted event (killed_trainer.py): within a save, a rename, a deletion, an update, a rollout, and
within the start that goes on. `make faults` kills at more moments (tests/rounds.py).
Run: pytest tests/faults/test_kill_trainer.py
"""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer.recording.json_lines import read_lines
from student_trainer.train_state import STATE_FILE, complete_checkpoints
from tests.faults.killed_trainer import Request, Trainers, trainers
from tests.rounds import ROUNDS
from tests.trainer.test_train import prepared

pytestmark = pytest.mark.e2e

STEPS, SEED = 10, 20
AS_METRICS_ARE_REPLACED = 5
"""Event of a start that goes on: what was recorded of later steps is about to be dropped."""
OVERRIDES = (
    f"run.steps={STEPS}",
    "run.texts=2",
    "rollout.prompts_per_step=2",
    "rollout.rollouts_per_prompt=1",
    'budget={"kind":"prune","initial":6,"minimum":4,"maximum":9,"increment":1,"margin":0,'
    '"hit_ratio":1.0,"patience":1}',
    "optim.warmup_steps=3",
    "optim.weight_decay=0.1",
    "eval.every_steps=2",
    "eval.pass_k=0",
    "eval.num_prompts=1",
    "checkpoint.every_steps=2",
    "checkpoint.keep=1",
    "checkpoint.keep_best=1",
    "trackers.report_to=[]",
)
MOMENTS = (
    r"half of trainer_state\.pt",
    r"os\.rename /checkpoints/step-\d+$",
    "step",
    r"half of model\.safetensors",
    r"os\.rename /checkpoints/\.step-\d+\.partial",
    "half of a line of step",
    r"open /checkpoints/\.step-\d+\.partial/evaluation\.partial",
    r"os\.remove model\.safetensors",
)
"""Events of which each has a kill of its own; the first are in every round, the others and any
event at all in the long one."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Where runs are made, and the one that nothing disturbs."""

    trainers: Trainers
    folder: Path

    @property
    def undisturbed(self) -> Path:
        return self.folder / "undisturbed"

    def train(self, name: str, *, kill_at: int | None) -> int:
        """Begins a run, or goes on with it."""
        out = self.folder / name
        sets = [word for override in OVERRIDES for word in ("--set", override)]
        command = ["train", "--config", str(self.folder / "trainer.toml"), *sets]
        return self.trainers.run(
            Request(
                arguments=[*command, "--set", f"run.out={out}", "--resume", "auto"],
                folder=str(out),
                log=str(self.folder / f"{name}.log"),
                kill_at=kill_at,
                events=str(self.folder / f"{name}.json"),
            )
        )

    def events(self) -> list[str]:
        """Of the undisturbed run, in order."""
        return list(json.loads(self.undisturbed.with_suffix(".json").read_text()))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with trainers() as forked:
        made = Runs(forked, prepared(tmp_path_factory.mktemp("runs")))
        assert made.train("undisturbed", kill_at=None) == 0, made.log("undisturbed")
        yield made


def chosen(events: list[str], count: int) -> list[int]:
    """Numbers of events, from 1 on: one of each kind, then any."""
    dice = random.Random(SEED)
    numbers = []
    for pattern in MOMENTS[:count]:
        of_kind = [n for n, name in enumerate(events, 1) if re.fullmatch(pattern, name)]
        assert of_kind, f"no event {pattern} among {sorted(set(events))}"
        numbers.append(dice.choice(of_kind))
    if count > len(MOMENTS):
        # The last deletion: after it nothing is saved any more.
        numbers.append(
            max(n for n, name in enumerate(events, 1) if name.startswith("os.rmdir /ch"))
        )
    return numbers + dice.sample(range(1, len(events)), count - len(numbers))


@pytest.mark.parametrize("number", range(ROUNDS.trainer_kills))
def test_what_goes_on_after_a_kill_is_the_undisturbed_run(runs: Runs, number: int) -> None:
    events = runs.events()
    kill_at = chosen(events, ROUNDS.trainer_kills)[number]
    name, said = f"killed-{number}", f"killed at event {kill_at}, {events[kill_at - 1]}"
    assert runs.train(name, kill_at=kill_at) == -signal.SIGKILL, said
    if number == 0:
        # The start that goes on is killed too, as it writes anew what was recorded.
        assert runs.train(name, kill_at=AS_METRICS_ARE_REPLACED) == -signal.SIGKILL, said
    assert runs.train(name, kill_at=None) == 0, f"{said}: {runs.log(name)[-3000:]}"
    assert_same(runs.folder / name, runs.undisturbed, said)


def assert_same(run: Path, other: Path, said: str) -> None:
    """Weights, moments, schedule, place in the data, budget, version and every figure: bit for bit;
    and nothing is left but what the other has."""
    pairs = [complete_checkpoints(folder / "checkpoints") for folder in (run, other)]
    names = [[path.name for path in paths] for paths in pairs]
    assert names[0] == names[1], said
    for one, wanted in [*zip(*pairs, strict=True), (run / "student", other / "student")]:
        for file in ("model.safetensors", "evaluation.json"):
            if (wanted / file).exists():
                assert (one / file).read_bytes() == (wanted / file).read_bytes(), (said, file)
    for one, wanted in zip(*pairs, strict=True):
        states = [torch.load(path / STATE_FILE) for path in (one, wanted)]
        for state in states:
            del state["settings"]["run.out"]
        assert flat(states[0]) == flat(states[1]), said
    for file in ("metrics.jsonl", "profiles.jsonl", "samples/rollouts.jsonl"):
        lines = [[untimed(line) for line in read_lines(folder / file)] for folder in (run, other)]
        assert lines[0] == lines[1], (said, file)
    left = [{p.name for p in (folder / "checkpoints").iterdir()} for folder in (run, other)]
    assert left[0] == left[1], said


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf by its place; of a tensor its type, shape and bytes."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {n: leaf for k, item in items for n, leaf in flat(item, f"{name}.{k}").items()}
    if isinstance(value, torch.Tensor):
        return {name: (value.dtype, tuple(value.shape), value.numpy().tobytes())}
    return {name: value}


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """Without what the clock says."""
    return {name: value for name, value in line.items() if not re.search(r"seconds|_s$", name)}


def test_the_undisturbed_run_is_one_of_everything_that_could_differ(runs: Runs) -> None:
    """A run in which nothing moves would be the same after any kill."""
    records = read_lines(runs.undisturbed / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    assert [step["step"] for step in steps] == [*range(1, STEPS + 1)]
    for name in ("loss", "learning_rate", "grad_norm", "max_tokens", "staleness_min_version"):
        assert len({step[name] for step in steps}) > 1, name
    (*_, newest) = complete_checkpoints(runs.undisturbed / "checkpoints")
    state = torch.load(newest / STATE_FILE)
    assert state["learner"]["optimizer"]["updates"] == 2 * STEPS
    assert state["stream"] == {"steps": STEPS, "rollouts": 2 * STEPS}
