"""(e) Whole steps over gRPC: a teacher server and a trainer as processes, on the playground.

Both by their command lines, the teacher with the transformers engine and the trainer with the
batched transformers sampler: once with the learner's own model in float32, once with a copy of its
weights in bfloat16, which a sync has to reach.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.device import Row, attempted
from benchmarks.gpu.sizes import Sizes
from benchmarks.processes import child, ready_file, what_failed
from benchmarks.provenance import ROOT
from benchmarks.trainer_work import CHECKPOINTS, PLAYGROUND
from student_trainer.recording.json_lines import METRICS_FILE

RUNS = ROOT / "runs" / "bench-gpu"
STEPS = 4
"""The first is not counted."""
ARMS: dict[str, dict[str, Any]] = {
    "float32, the learner's model": {
        "sampler": {"kind": "hf_batched", "weights": "shared"},
        "student.dtype": "float32",
    },
    "bfloat16, a copy": {
        "sampler": {"kind": "hf_batched", "weights": "copied"},
        "student.dtype": "bfloat16",
    },
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def rows(sizes: Sizes, device: str) -> Iterator[Row]:
    """Seconds a step by phase, and what says that it was right."""
    for name in ARMS:
        yield attempted(name, partial(figures, sizes, device, name))


def figures(sizes: Sizes, device: str, arm: str) -> dict[str, float]:
    """Of the steps behind the first one. Raises RuntimeError with what a process said last."""
    out = RUNS / arm.partition(",")[0]
    shutil.rmtree(out, ignore_errors=True)
    with teacher(device) as address:
        train(sizes, device, arm, out, address)
    lines = (out / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return of_steps([json.loads(line) for line in lines])


def of_steps(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians of a run's steps but for the first. Raises RuntimeError for one that is not right."""
    steps = [line for line in lines if line["kind"] == "step"]
    if len(steps) != STEPS:
        raise RuntimeError(f"{len(steps)} steps for {STEPS}")
    for name in ("loss", "grad_norm"):
        if not all(math.isfinite(step[name]) for step in steps):
            raise RuntimeError(f"{name} is not finite: {[step[name] for step in steps]}")
    phases = [name for name in steps[-1] if name.startswith("seconds_")]
    found = {name: median(step.get(name, 0.0) for step in steps[1:]) for name in phases}
    gaps = [step["sync_gap_nats"] for step in steps if step.get("sync_gap_nats") is not None]
    return {
        "seconds": sum(found.values()),
        **found,
        "tokens": median(step["generated_tokens"] for step in steps[1:]),
        "loss": steps[-1]["loss"],
        **({"sync_gap_nats": max(gaps)} if gaps else {}),
    }


def train(sizes: Sizes, device: str, arm: str, out: Path, address: str) -> None:
    """A trainer, from its start to its end. Raises RuntimeError."""
    changes = {
        **ARMS[arm],
        **PLAYGROUND.step_settings(out, CHECKPOINTS / "student", address, STEPS),
        "student.device": device,
        "rollout.prompts_per_step": sizes.rollouts,
        "rollout.max_context": PLAYGROUND.max_context - PLAYGROUND.max_tokens + sizes.response,
        "budget.max_tokens": sizes.response,
    }
    command = [sys.executable, "-m", "student_trainer.cli", "train", "--overwrite"]
    command += ["--config", str(PLAYGROUND.config)]
    for name, value in changes.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    with child("gpu-trainer", command, env=OFFLINE) as trainer:
        if code := trainer.process.wait():
            raise RuntimeError(f"the trainer: {what_failed(trainer.log)} (exit code {code})")


@contextmanager
def teacher(device: str) -> Iterator[str]:
    """A teacher server on free loopback ports; its address."""
    ready = ready_file()
    command = [sys.executable, "-m", "teacher_server.cli", "serve", "--engine", "hf"]
    command += ["--model", str(CHECKPOINTS / "teacher"), "--device", device]
    command += ["--dtype", "float32", "--max-context", str(PLAYGROUND.max_context)]
    command += ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
    with child("gpu-teacher", command, env=OFFLINE) as server:
        asyncio.run(server.until(ready.exists))
        address: str = json.loads(ready.read_text(encoding="utf-8"))["grpc_address"]
        ready.unlink()
        yield address
