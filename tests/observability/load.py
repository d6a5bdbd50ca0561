"""A teacher of each engine and two trainers, as processes, with tokens and metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from teacher_server.access.tenants_file import new_token
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from tests.observability.prometheus import free_port
from tests.tracked_files import ROOT
from tests.waiting import LIMIT_S, wait_until

START_S = 900.0
"""For an engine to start, however busy the machine."""
TENANTS = ("alice", "bob")
CHECKPOINTS = "examples/playground/checkpoints"
VLLM = ("--config", "configs/teacher-demo.toml", "--kv-cache-gib", "0.05", "--cpu-cores", "shared")
HF = ("--engine", "hf", "--model", f"{CHECKPOINTS}/teacher", "--dtype", "float32")
HF_LIMITS = ("--max-context", "320", "--max-k", "32")
TRAINER = (
    *("run.steps=2000", 'sampler={"kind": "hf_batched"}', "rollout.prompts_per_step=8"),
    *("rollout.max_staleness=1", "eval.every_steps=8", "eval.num_prompts=4", "eval.pass_k=1"),
    *("budget.max_tokens=160", "checkpoint.every_minutes=null", "recording.rollouts_per_step=0"),
)


@dataclass(slots=True)
class Load:
    """What is running, and where its metrics are."""

    folder: Path
    tokens: dict[str, str]
    ports: dict[str, tuple[int, int]] = field(default_factory=dict)
    """gRPC and HTTP of each teacher, by engine."""
    trainers: dict[str, int] = field(default_factory=dict)
    """Port of the metrics of each trainer, by tenant."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def targets(self) -> dict[str, list[str]]:
        return {
            "teacher": [f"127.0.0.1:{http}" for _, http in self.ports.values()],
            "trainer": [f"127.0.0.1:{port}" for port in self.trainers.values()],
        }

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text("utf-8", "replace")

    def start(self, name: str, module: str, *words: str, **variables: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=log,
                stderr=log,
            )

    def start_teacher(self, engine: str) -> None:
        """At the same ports the second time."""
        if engine not in self.ports:
            self.ports[engine] = (free_port(), free_port())
        grpc_port, http_port = self.ports[engine]
        self.start(
            engine,
            *("teacher_server.cli", "serve", *(VLLM if engine == "vllm" else (*HF, *HF_LIMITS))),
            *("--grpc-port", str(grpc_port), "--http-port", str(http_port), "--open-metrics"),
            *("--tenants-file", str(self.folder / "tenants.toml")),
        )

    def start_trainer(self, tenant: str, *engines: str) -> None:
        self.trainers[tenant] = free_port()
        endpoints = ",".join(f'"127.0.0.1:{self.ports[engine][0]}"' for engine in engines)
        settings = (
            *TRAINER,
            f"run.out={self.folder / 'runs' / tenant}",
            f"run.seed={TENANTS.index(tenant)}",
            f"teacher.endpoints=[{endpoints}]",
            f"metrics.port={self.trainers[tenant]}",
        )
        sets = [word for setting in settings for word in ("--set", setting)]
        self.start(
            tenant,
            *("student_trainer.cli", "train", "--config", "configs/trainer-demo.toml", *sets),
            DRIFTLINE_TEACHER_TOKEN=self.tokens[tenant],
        )

    def wait_until_ready(self, engine: str) -> None:
        url = f"http://127.0.0.1:{self.ports[engine][1]}/readyz"

        def ready() -> bool:
            assert self.processes[engine].poll() is None, self.log(engine)
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return True
            except OSError:
                return False

        wait_until(ready, START_S)

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        self.processes[name].send_signal(number)
        self.processes[name].wait(LIMIT_S)

    def ask_in_every_other_way(self) -> None:
        """An answered call, an error, and a text over HTTP."""
        metadata = (("authorization", f"Bearer {self.tokens['bob']}"),)
        for grpc_port, http_port in self.ports.values():
            with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
                stub = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
                stub.GetInfo(pb.GetInfoRequest(), timeout=LIMIT_S, metadata=metadata)
            for path, body in (
                (
                    "/v1/completions",
                    b'{"prompt": [1, 2, 3, 4], "prompt_logprobs": 1, "max_tokens": 1}',
                ),
                ("/v1/nowhere", b"{}"),
            ):
                request = urllib.request.Request(
                    f"http://127.0.0.1:{http_port}{path}",
                    data=body,
                    headers={
                        "content-type": "application/json",
                        "authorization": f"Bearer {self.tokens['bob']}",
                    },
                )
                try:
                    urllib.request.urlopen(request, timeout=LIMIT_S).close()
                except urllib.error.HTTPError as error:
                    error.close()


@contextmanager
def load(folder: Path) -> Iterator[Load]:
    """Two replicas that serve, and a trainer each for two tenants: one of both, one of vLLM's."""
    tokens, lines = {}, ""
    for tenant in TENANTS:
        tokens[tenant], entry = new_token(tenant)
        lines += f"{entry}max_sessions = 200\n"
    tenants_file = folder / "tenants.toml"
    tenants_file.touch(mode=0o600)
    tenants_file.write_text(lines)
    running = Load(folder, tokens)
    with ExitStack() as stack:
        stack.callback(_end_all, running)
        for engine in ("hf", "vllm"):
            running.start_teacher(engine)
        for engine in ("hf", "vllm"):
            running.wait_until_ready(engine)
        running.start_trainer("alice", "hf", "vllm")
        running.start_trainer("bob", "vllm")
        yield running


def _end_all(running: Load) -> None:
    for process in running.processes.values():
        process.terminate()
    give_up = time.monotonic() + LIMIT_S
    for process in running.processes.values():
        try:
            process.wait(max(0.1, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
