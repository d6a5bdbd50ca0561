"""Three hosts: a teacher and two trainers, TLS and tokens on, the teacher's cable pulled for 10 s.

Real programs in network namespaces, the playground's models, transformers on both sides, which
gives the same to the bit however long an answer takes. Nobody is started again by hand.

Run: make test-hosts (as root)
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rollout_records.reading import read_rollout, read_table, steps
from tests.faults.access_servers import tenants_toml, write_private
from tests.faults.made_certificates import Authority
from tests.faults.training_runs import CHECKPOINTS, ROOT, SHORT
from tests.hosts.namespaces import Host, hosts, missing
from tests.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]

CUT_S = 10.0
STEPS = 8
CUT_AFTER = 2
"""Steps that each trainer has done when the cable is pulled."""
SEEDS = {"first": 0, "second": 1}
TOKENS = {"first": "a" * 43, "second": "b" * 43}
ENV = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
PORTS = {"grpc": 50051, "http": 8080}
TIMES = {"started_at", "generate_s", "score_wait_s", "round_trip_tokens"}
"""Columns that tell of the clock."""


@dataclass(slots=True)
class Trainer:
    """A run in a namespace."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    seen: list[int] = field(default_factory=list)

    def records(self) -> list[dict[str, Any]]:
        """Of its steps, as far as they are written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [r for r in map(json.loads, lines) if r["kind"] == "step"]


@dataclass(slots=True)
class Site:
    """A teacher's host and its secrets."""

    folder: Path
    teacher: Host
    others: list[Host]
    ca: Path

    def trainer(self, name: str, host: Host, runs: Path) -> Trainer:
        token = self.folder / f"{name}.token"
        write_private(token, TOKENS[name])
        values = SHORT | {
            "run.steps": STEPS,
            "run.out": runs / name,
            "run.seed": SEEDS[name],
            # A rollout is one question: where an answer is late, pieces would be cut otherwise, and
            # sums rounded otherwise.
            "rollout.chunk_tokens": SHORT["budget.max_tokens"],
            "recording.rollouts_per_step": '"all"',
            "checkpoint.every_steps": STEPS,
            "teacher.endpoints": f'["{self.teacher.address}:{PORTS["grpc"]}"]',
            "teacher.token_file": token,
            "teacher.tls_ca": self.ca,
            "teacher.connect_timeout_s": 60.0,
        }
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "student_trainer.cli", "train"]
        command += ["--config", str(ROOT / "configs" / "trainer-demo.toml"), *sets]
        log = runs / f"{name}.log"
        return Trainer(runs / name, host.start(command, log, ENV), log)


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """The three hosts, with a teacher that serves."""
    with hosts(3) as (teacher, *others):
        authority = Authority(folder, "site")
        pair = authority.issue("teacher", hosts=(teacher.address,))
        tenants, ready, log = folder / "tenants.toml", folder / "ready.json", folder / "teacher.log"
        write_private(tenants, tenants_toml(TOKENS))
        command = [sys.executable, "-m", "teacher_server.cli", "serve", "--engine", "hf"]
        command += ["--model", str(CHECKPOINTS / "teacher"), "--max-context", "320"]
        command += ["--dtype", "float32", "--device", "cpu", "--host", "0.0.0.0"]
        command += ["--grpc-port", str(PORTS["grpc"]), "--http-port", str(PORTS["http"])]
        command += ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]
        command += ["--tenants-file", str(tenants), "--ready-file", str(ready), "--open-metrics"]
        process = teacher.start(command, log, ENV)
        try:
            wait_until(lambda: ready.exists() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield Site(folder, teacher, others, authority.ca)
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(60)


def two_runs(place: Site, runs: Path, *, cut: bool) -> list[Trainer]:
    """Both trainers to their end, with or without a cut in the middle."""
    runs.mkdir()
    with ExitStack() as stack:
        trainers = []
        for (name, _), host in zip(SEEDS.items(), place.others, strict=True):
            trainer = place.trainer(name, host, runs)
            stack.callback(trainer.process.wait)
            stack.callback(trainer.process.terminate)
            trainers.append(trainer)
        if cut:
            cut_the_cable(place, trainers)
        for trainer in trainers:
            code = trainer.process.wait(400)
            assert code == 0, trainer.log.read_text()
    return trainers


def cut_the_cable(place: Site, trainers: list[Trainer]) -> None:
    """Once both are in the middle, for ten seconds in which neither finishes what it waits for."""

    def in_the_middle() -> bool:
        for trainer in trainers:
            assert trainer.process.poll() is None, trainer.log.read_text()
        return all(len(trainer.records()) >= CUT_AFTER for trainer in trainers)

    wait_until(in_the_middle)
    place.teacher.set_link("down")
    # What had been answered before may still end a step.
    time.sleep(1.0)
    before = [len(trainer.records()) for trainer in trainers]
    assert all(count < STEPS for count in before), "the runs were over before the cut"
    time.sleep(CUT_S - 1.0)
    for trainer, count in zip(trainers, before, strict=True):
        assert trainer.process.poll() is None, trainer.log.read_text()
        trainer.seen = [count, len(trainer.records())]
    place.teacher.set_link("up")


def assert_same_rollouts(one: Path, other: Path) -> int:
    """All that was recorded of every token, to the bit; returns how many tokens that are."""
    left, right = steps(one / "rollouts"), steps(other / "rollouts")
    assert [*left] == [*right] == [*range(1, STEPS + 1)]
    tokens = 0
    for step in left:
        count = read_table(left[step]).num_rows
        assert count == read_table(right[step]).num_rows == 4
        for index in range(count):
            a, b = read_rollout(left[step], index), read_rollout(right[step], index)
            assert a.keys() == b.keys()
            for name in a.keys() - TIMES:
                np.testing.assert_array_equal(a[name], b[name], err_msg=f"{step} {name}")
            tokens += len(a["response_ids"])
    return tokens


@pytest.mark.timeout(1500)
def test_a_cut_of_ten_seconds_changes_no_row(tmp_path: Path) -> None:
    with site(tmp_path) as place:
        undisturbed = two_runs(place, tmp_path / "undisturbed", cut=False)
        cut = two_runs(place, tmp_path / "cut", cut=True)
    for plain, disturbed in zip(undisturbed, cut, strict=True):
        before, after = disturbed.seen
        assert after == before, "steps went on while the cable was pulled"
        tokens = assert_same_rollouts(plain.folder, disturbed.folder)
        for one, other in zip(plain.records(), disturbed.records(), strict=True):
            assert one["step"] == other["step"]
            assert one["loss"] == other["loss"]
            assert one["rollouts"] == other["rollouts"]
        left, right = (
            load_file(trainer.folder / "student" / "model.safetensors")
            for trainer in (plain, disturbed)
        )
        assert all(torch.equal(left[name], right[name]) for name in left)
        said = f"{STEPS} steps, {tokens} tokens, cut after step {before}: equal to the bit"
        sys.stdout.write(f"\n  {plain.folder.name}: {said}")
