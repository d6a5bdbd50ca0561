"""A real Prometheus in a folder of its own, on loopback; ended by who started it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.observability.promql import FOLDER
from tests.waiting import LIMIT_S, wait_until

SCRAPE_S = 1


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: labels, seconds since 1970, values."""

    labels: dict[str, str]
    at_s: list[float]
    values: list[float]


class Prometheus:
    """What it answers over HTTP."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _ask(self, path: str, **arguments: object) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=LIMIT_S) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{arguments}: {error.read().decode()}") from error

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=LIMIT_S):
                return True
        except OSError:
            return False

    def now(self, expr: str) -> list[Series]:
        """The answer at this moment."""
        found = self._ask("query", query=expr)["result"]
        return [Series(s["metric"], [s["value"][0]], [float(s["value"][1])]) for s in found]

    def over(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        """The answer over a span of time."""
        found = self._ask("query_range", query=expr, start=start_s, end=end_s, step=step_s)
        return [
            Series(s["metric"], [t for t, _ in s["values"]], [float(v) for _, v in s["values"]])
            for s in found["result"]
        ]

    def healthy_targets(self) -> set[str]:
        """Addresses whose last scrape went well."""
        targets = self._ask("targets", state="active")["activeTargets"]
        return {t["labels"]["instance"] for t in targets if t["health"] == "up"}


def free_port() -> int:
    """One that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def configured(folder: Path, targets: Mapping[str, Sequence[str]]) -> Path:
    """Our configuration with addresses in place of names of the Compose network."""
    text = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    seconds = f"{SCRAPE_S}s"
    config["global"] = {"scrape_interval": seconds, "evaluation_interval": seconds}
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [*targets[job["job_name"]]]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(FOLDER / "alerts.yml", folder)
    return path


def program(name: str) -> str:
    """Where a program of Prometheus is."""
    found = shutil.which(name)
    assert found, f"there is no {name}: it is in Debian's package `prometheus`"
    return found


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """One that scrapes these addresses by job."""
    address = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus"),
        f"--config.file={configured(folder, targets)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(address)
        wait_until(lambda: process.poll() is not None or server.is_ready())
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield server
    finally:
        process.terminate()
        process.wait(LIMIT_S)
