"""Hosts on one machine: network namespaces, each with an address, on a bridge in one of its own.

Nothing of the machine's own network is touched: the bridge has a namespace too, and no way out of
it. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.91.7"


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    return ""


def ip(*words: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace, its address, and its end of the cable in the switch."""

    name: str
    address: str
    port: str
    switch: str

    def start(self, command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """A program there, as its own process: `ip netns exec` becomes the program."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env={**os.environ, **env},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def set_link(self, state: str) -> None:
        """`down` pulls the cable, `up` puts it back."""
        ip("-n", self.switch, "link", "set", self.port, state)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many, which reach each other and nothing else."""
    stem = f"dl{os.getpid()}"
    switch = f"{stem}-switch"
    made = [
        Host(f"{stem}-{number}", f"{NETWORK}.{number}", f"port{number}", switch)
        for number in range(1, count + 1)
    ]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host in made:
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
            near = ("link", "add", host.port, "type", "veth")
            ip("-n", switch, *near, "peer", "name", "eth0", "netns", host.name)
            ip("-n", switch, "link", "set", host.port, "master", "bridge", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
        yield made
    finally:
        for name in (*(host.name for host in made), switch):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
