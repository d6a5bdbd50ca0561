"""Nothing that a test starts outlives it, even where the test's own process is killed.

Run: pytest tests/faults/test_left_behind.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.live_server import gone
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
STARTS_SERVERS = """
import sys, time
from pathlib import Path
from tests.faults.live_server import LiveServer

for forked in (True, False):
    server = LiveServer(Path(sys.argv[1]), forked=forked)
    print(server.wait_until_ready().process.pid, flush=True)
time.sleep(3600)
"""


def test_servers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])}
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTS_SERVERS, str(tmp_path)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    with starter:
        try:
            assert starter.stdout is not None
            servers = [int(starter.stdout.readline()) for _ in range(2)]
            assert not any(map(gone, servers))
        finally:
            starter.kill()
    wait_until(lambda: all(map(gone, servers)))
