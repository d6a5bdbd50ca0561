"""The service's own cost of an append does not creep up: pytest tests/benchmarks/test_overhead.py

Nothing here depends on how fast or how busy a machine is. Where a figure has grown for a good
reason, or has shrunk: python -m tests.benchmarks.overhead --record
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from teacher_wire import codec
from tests.benchmarks import overhead
from tests.waiting import LIMIT_S

GROWTH = {
    "instructions_per_append": 1.2,
    "calls_per_append": 1.2,
    "peak_bytes_per_token": 1.2,
    # Counts repeat to a few per cent under any load. This moves by six, and more from one processor
    # to another, whose vectors suit the reference better or worse: only a blunder shows here.
    "cpu_over_reference": 1.6,
}
"""What each figure may be of the one on record."""


def grown(now: overhead.Overhead) -> list[str]:
    """The figures that have grown too much."""
    record = overhead.recorded()
    if record is None:
        pytest.skip(f"no figures on record for Python {overhead.PYTHON}")
    return [name for name, limit in GROWTH.items() if asdict(now)[name] > limit * record[name]]


@pytest.fixture(scope="module")
def now() -> overhead.Overhead:
    """In a process of its own: what other tests have left in memory would count."""
    command = [sys.executable, "-m", "tests.benchmarks.overhead", "--json"]
    done = subprocess.run(
        command, cwd=overhead.ROOT, check=True, capture_output=True, text=True, timeout=LIMIT_S
    )
    return overhead.Overhead(**json.loads(done.stdout))


def test_an_append_takes_no_more_work_than_on_record(now: overhead.Overhead) -> None:
    assert grown(now) == [], now


def test_a_token_makes_no_objects(now: overhead.Overhead) -> None:
    """Under one instruction a token: what loops, loops over blocks of rows."""
    assert now.instructions_per_token < 1.0


@pytest.mark.parametrize(
    "slow",
    [
        "def encode_ids(ids):\n    return b''.join(row.tobytes() for row in ids)\n",
        "def encode_ids(ids):\n    return np.array(ids.tolist(), _I32).tobytes()\n",
    ],
    ids=["a loop over rows", "a list of numbers"],
)
def test_a_slower_codec_is_noticed(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, object] = {}
    exec(compile(slow, codec.__file__, "exec"), codec.__dict__, made)  # counts as our code
    monkeypatch.setattr(codec, "encode_ids", made["encode_ids"])
    counted = set(grown(overhead.measured(rounds=1))) - {"cpu_over_reference"}
    assert counted, "no count has grown"
