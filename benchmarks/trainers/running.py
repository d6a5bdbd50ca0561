"""One run of one arm: its processes, what they said, and whether it was the work that was asked."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import Child, child, ready_file, what_failed
from benchmarks.provenance import ROOT, commit
from benchmarks.trainers import environment, pairs
from benchmarks.trainers.load import Others
from benchmarks.trainers.memory import Peaks
from benchmarks.trainers.pairs import Arm, Pair
from benchmarks.trainers.task import Task, prompts_digest

RUNS = ROOT / "runs" / "bench-trainers"
RUN_LIMIT_S = 3600.0
SAME = ("max_tokens", "temperature", "betas", "weight_decay", "max_grad_norm")
"""What a task says once and both trainers must have gone by."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
TRLS_VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""GiB, as our sampler's."""
Event = dict[str, Any]


def run(
    pair: Pair,
    arm: Arm,
    number: int,
    *,
    steps: int,
    environments: Mapping[str, Path],
    said: Callable[[str], None],
) -> dict[str, Any]:
    """A record of a run: every step, start-up, memory, settings. Raises whatever prevents it."""
    out = RUNS / pair.name / f"{arm.name}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    if arm.mode is not None:
        task = pairs.task(pair, arm, seed=number, steps=steps, out=out, teacher="nobody:1")
        kind = "trl_vllm" if arm.mode == "vllm" else "trl"
        requirements = environment.TRL_VLLM if arm.mode == "vllm" else environment.TRL
        python = environment.made(environments[kind], requirements, said)
        words = [str(python), "-m", "benchmarks.trainers.trl_child"]
        record = _watched(task, words, [arm.mode], {})
    else:
        with _teacher(pair) as (address, pid):
            task = pairs.task(pair, arm, seed=number, steps=steps, out=out, teacher=address)
            words = [sys.executable, "-m", "benchmarks.trainers.driftline_child"]
            record = _watched(task, words, [], {"teacher": pid})
    if unlike := differences(task, record["steps"], record["settings"]):
        raise RuntimeError(f"not the work that was asked: {'; '.join(unlike)}")
    return {"round": number, "of": task.digest(), "commit": commit(), **record}


def _watched(
    task: Task, words: Sequence[str], last: Sequence[str], others: Mapping[str, int]
) -> dict[str, Any]:
    """Starts a trainer and reads what it says to its end."""
    path = Path(task.out) / "task.json"
    task.write(path)
    log_name = f"trainers-{task.pair}-{task.arm}"
    environ = OFFLINE | (TRLS_VLLM if "vllm" in last else {})
    started = time.monotonic()
    with child(log_name, [*words, str(path), *last], env=environ, stdout=subprocess.PIPE) as made:
        with Peaks({"trainer": made.process.pid, **others}) as peaks, _limited(made):
            events = list(_beside_others(_events(made)))
        code = made.process.wait()
        log = made.log
    if code or not events or events[-1]["event"] != "done":
        raise RuntimeError(f"{what_failed(log)} (exit code {code})")
    return record_of(events, started) | {"peak_mib": peaks.mib()}


def _events(made: Child) -> Iterator[Event]:
    assert made.process.stdout is not None
    for line in made.process.stdout:
        yield json.loads(line)
    made.process.stdout.close()


def _beside_others(events: Iterator[Event]) -> Iterator[Event]:
    """The same, each told what others had of the machine since the one before."""
    others = Others.since(time.monotonic())
    for event in events:
        yield event | {"others_cores": others.cores(time.monotonic())}


@contextmanager
def _limited(made: Child) -> Iterator[None]:
    """Ends a process that takes an hour."""
    timer = threading.Timer(RUN_LIMIT_S, made.process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def record_of(events: Sequence[Event], started: float) -> dict[str, Any]:
    """What the lines of a run come to.

    Args:
        events: as the child told them.
        started: monotonic seconds at which its command was started.
    """
    at = {event["event"]: event["at"] for event in reversed(events)}
    first = at.get("first_token")
    return {
        "ready_s": round(at["ready"] - started, 2),
        "start_up_s": None if first is None else round(first - started, 2),
        "others_cores_at_start": max(
            event["others_cores"] for event in events if event["event"] in ("ready", "first_token")
        ),
        "steps": [
            {key: value for key, value in event.items() if key not in ("event", "at")}
            for event in events
            if event["event"] == "step"
        ],
        "settings": events[-1]["settings"],
    }


def differences(task: Task, steps: Sequence[Event], settings: Mapping[str, Any]) -> list[str]:
    """In what a run was other work than the task says; empty where it was the same.

    Read from what was sampled, learnt and set, not from what was passed on: prompts and rollouts of
    every step, lengths, the learning rate of every update, temperature of sampling and of the loss,
    precision, and the optimiser's constants. Without a stop the loss must have seen every token.
    """
    found = [
        f"{name} {settings[name]!r} for {wanted!r}"
        for name in SAME
        if settings[name] != (wanted := _plain(getattr(task, name)))
    ]
    found += [
        f"{name} {settings[name]!r} for {wanted!r}"
        for name, wanted in (
            ("temperature_of_loss", task.temperature),
            ("top_p", 1.0),
            ("dtype", task.dtype),
            ("sampler_dtype", task.dtype),
            ("updates_a_step", task.updates),
            ("gradient_checkpointing", False),
        )
        if settings[name] != wanted
    ]
    if settings.get("autocast"):
        found.append("autocast to another precision")
    if [step["step"] for step in steps] != list(range(1, task.steps + 1)):
        found.append(f"{len(steps)} steps for {task.steps}")
        return found
    last_rates = task.learning_rates[task.updates - 1 :: task.updates]
    for step, ids, rate in zip(steps, task.prompt_ids, last_rates, strict=True):
        found += [f"step {step['step']}: {what}" for what in _unlike(task, step, ids, rate)]
        if not settings.get("stop_in_flight") and step["loss_tokens"] != step["generated_tokens"]:
            found.append(
                f"step {step['step']}: the loss saw {step['loss_tokens']} of "
                f"{step['generated_tokens']} tokens"
            )
    return found


def _unlike(task: Task, step: Event, ids: list[list[int]], rate: float) -> Iterator[str]:
    if step["rollouts"] != task.rollouts:
        yield f"{step['rollouts']} rollouts for {task.rollouts}"
    if step["prompts"] != prompts_digest(ids):
        yield "other prompts"
    if step["longest"] > task.max_tokens:
        yield f"a rollout of {step['longest']} tokens for at most {task.max_tokens}"
    if not math.isclose(step["learning_rate"], rate, rel_tol=1e-9):
        yield f"learning rate {step['learning_rate']} for {rate}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _teacher(pair: Pair) -> Iterator[tuple[str, int]]:
    """A teacher server on free loopback ports, as the pair's demo starts it: address and process.

    It is up before the trainer is started, and its start-up is in no figure.
    """
    ready = ready_file()
    flags = ["--model", str(pair.teacher), "--max-context", str(pair.max_context)]
    flags += ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
    if tomllib.loads(pair.teacher_config.read_text(encoding="utf-8"))["engine"] == "vllm":
        # As examples/demo.py: the sampler has the other cores.
        flags += ["--cpu-cores", str((os.cpu_count() or 1) - 1)]
    command = [sys.executable, "-m", "teacher_server.cli", "serve"]
    command += ["--config", str(pair.teacher_config), *flags]
    with child(f"trainers-teacher-{pair.name}", command) as server:
        asyncio.run(server.until(ready.exists))
        address: str = json.loads(ready.read_text())["grpc_address"]
        ready.unlink()
        yield address, server.process.pid


def heldout(pair: Pair, folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, float]]]:
    """Figures of each saved student, as they come. Raises RuntimeError."""
    words = [sys.executable, "-m", "benchmarks.trainers.heldout", pair.name, *map(str, folders)]
    with child(f"trainers-heldout-{pair.name}", words, env=OFFLINE, stdout=subprocess.PIPE) as made:
        for event in _events(made):
            yield Path(event["folder"]), event["figures"]
        code, log = made.process.wait(), made.log
    if code:
        raise RuntimeError(f"{what_failed(log)} (exit code {code})")
