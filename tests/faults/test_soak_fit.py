"""The soak's verdict: a leak is seen, a peak is not one.

Run: pytest tests/faults/test_soak_fit.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.faults import soak


def record(rss_mb_of: Any, **changes: Any) -> dict[str, Any]:
    """Twenty minutes, a sample every five seconds, with noise."""
    rng = np.random.default_rng(0)
    samples = [
        {"s": s, "rss_mb": rss_mb_of(s) + rng.normal(0, 0.2), "fds": 20.0, "sessions": 3.0}
        for s in np.arange(0, 1200, 5.0)
    ]
    fields = {
        "engine": "fake",
        "cores": 2,
        "clients": {"in_order": 5},
        "codes": {"OK": 5},
        "errors": {},
    }
    fields |= {"bytes_a_cancelled_client": 150.0}
    return {**fields, "sessions_left": 0, "exit_code": 0, "samples": samples, **changes}


def broken(one: dict[str, Any]) -> list[str]:
    return [what for what, _, _, kept in soak.judged(one) if not kept]


def test_flat_memory_after_a_warm_up_is_kept() -> None:
    assert broken(record(lambda s: 90 + min(s, 200) / 20)) == []


def test_a_peak_is_no_slope() -> None:
    assert broken(record(lambda s: 90 + 30 * (1100 < s < 1150))) == []


@pytest.mark.parametrize("mb_per_hour", [2.0, 20.0])
def test_a_leak_is_seen(mb_per_hour: float) -> None:
    assert broken(record(lambda s: 90 + s * mb_per_hour / 3600)) == [
        "memory after warm-up, MB an hour"
    ]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"codes": {"OK": 5, "INTERNAL": 1}}, "unexpected codes"),
        ({"errors": {"EngineError": 1}}, "unexpected errors"),
        ({"sessions_left": 1}, "sessions left"),
        ({"exit_code": 1}, "exit code after SIGTERM"),
    ],
)
def test_what_must_not_happen_is_seen(changes: dict[str, Any], what: str) -> None:
    one = record(lambda s: 90.0, **changes)
    assert broken(one) == [what]
    assert f"| {what} |" in soak.table(one)
    assert "BROKEN" in soak.table(one)


def test_descriptors_that_grow_are_seen() -> None:
    one = record(lambda s: 90.0)
    for sample in one["samples"]:
        sample["fds"] += sample["s"] / 100
    assert broken(one) == ["file descriptors, growth of the median"]


def test_an_engine_that_grows_in_its_own_processes_is_seen() -> None:
    one = record(lambda s: 90.0, engine="vllm")
    for sample in one["samples"]:
        sample["engine_rss_mb"] = 2000.0 + sample["s"] / 100
    assert broken(one) == ["memory of the engine's processes, MB an hour"]
