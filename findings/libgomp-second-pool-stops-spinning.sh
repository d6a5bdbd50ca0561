#!/usr/bin/env bash
# torch 2.13.0 with the libgomp of its wheel: once a second thread of the process has computed anything in parallel,
# every parallel operation of the first thread sleeps and is woken, though GOMP_SPINCOUNT says that it should spin.
#
# What is done: a small silu, 2,000 times on two threads, of which each operation takes tens of microseconds; once
# alone, once after another thread has done the same a hundred times and then waits for good. Both with
# GOMP_SPINCOUNT=10000, with and without OMP_WAIT_POLICY=active, on two cores.
# Seen: alone about 20 voluntary context switches in 2,000 operations; with the idle thread's pool nearly two an operation,
# and three times as long an operation (33 us, 95 us). libgomp counts the threads of all pools, and where there are
# more than cores it spins only a hundred turns; a thousand if the policy is "active", which is enough: 110 switches.
# A trainer that runs an event loop beside its learner has such a second pool.
# Needs two cores or more, idle. Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy
cat >waits.py <<'PY'
import json
import os
import resource
import subprocess
import sys
import threading
import time

CALLS = 2000


def child(with_second: bool) -> None:
    import torch

    torch.set_num_threads(2)
    x = torch.randn(200, 576)
    done, never = threading.Event(), threading.Event()

    def second() -> None:
        for _ in range(100):
            torch.nn.functional.silu(x)
        done.set()
        never.wait()

    if with_second:
        threading.Thread(target=second, daemon=True).start()
        done.wait()
    for _ in range(CALLS):
        torch.nn.functional.silu(x)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.perf_counter()
    for _ in range(CALLS):
        torch.nn.functional.silu(x)
    seconds = time.perf_counter() - started
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
    sys.stdout.write(json.dumps({"switches": switches, "us": 1e6 * seconds / CALLS}))


def run(with_second: bool, policy: str | None) -> int:
    """Voluntary context switches, the least of three tries."""
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000"}
    environment.pop("OMP_WAIT_POLICY", None)
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    command = ["taskset", "-c", "0,1", sys.executable, __file__, str(int(with_second))]
    tries = [
        json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    best = min(tries, key=lambda found: found["switches"])
    pools = "a second thread's pool" if with_second else "alone"
    sys.stdout.write(
        f"OMP_WAIT_POLICY {policy}, {pools}: {best['switches']} switches, {best['us']:.0f} us a call\n"
    )
    return best["switches"]


if len(sys.argv) > 1:
    child(sys.argv[1] == "1")
else:
    alone, throttled, active = run(False, None), run(True, None), run(True, "active")
    sys.exit(0 if alone < CALLS / 4 and throttled > CALLS and active < CALLS / 4 else 1)
PY
env/bin/python waits.py
