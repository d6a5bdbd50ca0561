"""Teacher servers on the fake engine, each a process, and what they say of themselves."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.capacity.arithmetic import TeacherSpeed
from benchmarks.processes import LOGS, child

VOCABULARY = 64
"""Rows of the fake engine cost processor time by its vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A teacher that is up."""

    grpc_address: str
    http_address: str
    pid: int

    def metrics(self) -> dict[str, float]:
        """Its samples, by name and labels as Prometheus writes them: name{label="value"}."""
        with urllib.request.urlopen(f"http://{self.http_address}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def rss_mb(self) -> float:
        """Memory that the process holds now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def num_fds(self) -> int:
        """File descriptors that the process has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


def flags(speed: TeacherSpeed, *more: str) -> list[str]:
    """A server whose engine has that speed, and whose door holds back nothing that a step takes."""
    return [
        *("--engine", "fake", "--grpc-port", "0", "--http-port", "0", "--max-k", "8"),
        *("--fake-vocab-size", str(VOCABULARY), "--fake-tokens-per-s", str(speed.tokens_per_s)),
        *("--fake-latency-s", str(speed.step_s), "--fake-step-tokens", str(speed.step_tokens)),
        *("--max-running", "4096", "--max-running-tokens", str(4 * speed.step_tokens)),
        *("--log-level", "warning", *more),
    ]


@asynccontextmanager
async def servers(
    speed: TeacherSpeed, number: int, name: str, *more: str
) -> AsyncIterator[list[Server]]:
    """So many, ready, and ended on leaving."""
    LOGS.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        found = []
        for i in range(number):
            ready = LOGS / f"capacity-{name}-{i}.json"
            ready.unlink(missing_ok=True)
            words = ["-m", "teacher_server.cli", "serve", *flags(speed, *more)]
            command = [sys.executable, *words, "--ready-file", str(ready)]
            made = stack.enter_context(child(f"capacity-{name}-{i}", command))
            await made.until(ready.exists)
            said = json.loads(ready.read_text())
            found.append(
                Server(
                    grpc_address=said["grpc_address"],
                    http_address=said["http_address"],
                    pid=made.process.pid,
                )
            )
        yield found
