"""For all tests: gRPC is told to be quiet before a test imports it, long files begin first, and
imports are made without looking for garbage."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest

import teacher_wire  # noqa: F401

LONGEST_FIRST = (
    "e2e/test_demo.py",
    "faults/test_several_processes.py",
    "trainer/learner/test_sharding.py",
    "faults/test_kill_vllm.py",
    "faults/test_sampler_restart.py",
    "faults/test_kill_trainer.py",
    "faults/test_stop_trainer.py",
    "faults/test_signal_at_start.py",
    "teacher/engine/test_engines.py",
    "faults/test_kill_teacher.py",
    "faults/test_fuzz.py",
    "trainer/rollouts/test_samplers.py",
    "teacher/process/test_server_process.py",
    "faults/test_lifecycle.py",
    "faults/test_fair_shares.py",
    "faults/test_thousand_kills.py",
    "faults/test_slow_readers.py",
    "faults/test_channel_options.py",
    "page/test_page.py",
    "trainer/test_failures.py",
    "trainer/test_train.py",
    "trainer/test_stopping.py",
)
"""So that no process is left alone with one of them in the end; all others follow by name."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.nodeid.partition("::")[0].removeprefix("tests/")
        return LONGEST_FIRST.index(path) if path in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def log_of_a_command_ends_with_its_test() -> Iterator[None]:
    """A command that a test calls in this process writes its log to that test's standard error."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


gc.disable()
"""While tests are collected: torch and transformers are imported then, and a third of the time that
takes would go into looking for garbage among what stays to the end."""


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries complain that it was left behind
