"""An engine's process imports without collecting, and collects from the plugin on; it ends with the
process that started it.

Run: pytest tests/faults/test_engine_imports.py
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.faults.engine_processes import is_gone
from tests.waiting import wait_until
from vllm_process.children import children_end_with_us
from vllm_process.imports import collect_again, uncollected

TOLD = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "TRITON_F32_DEFAULT": "ieee"}


def tell(end: Connection) -> None:
    """Whether a process collects, at its begin and from the plugin on."""
    before = gc.isenabled()
    collect_again()
    end.send((before, gc.isenabled()))


def told() -> tuple[bool, bool]:
    """What a spawned process says."""
    context = multiprocessing.get_context("spawn")
    ours, other = context.Pipe()
    process = context.Process(target=tell, args=(other,))
    with ours, other:
        process.start()
        other.close()
        said: tuple[bool, bool] = ours.recv()
        process.join()
    return said


def test_a_process_of_an_engine_collects_once_it_has_imported() -> None:
    main = sys.modules["__main__"].__spec__
    with children_end_with_us():
        assert told() == (False, True)
    assert sys.modules["__main__"].__spec__ is main
    assert told() == (True, True)


@pytest.mark.parametrize("operators", [{}, {"TRITON_F32_DEFAULT": "tf32x3"}])
def test_a_process_of_an_engine_is_spawned_and_multiplies_in_float32(
    operators: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU too, where vLLM would fork it and its attention in float32 would be of TF32."""
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    for name, value in operators.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with children_end_with_us():
        assert {name: os.environ[name] for name in TOLD} == TOLD | operators
    assert dict(os.environ) == before


def work(end: Connection) -> None:
    """For good."""
    end.send(os.getpid())
    time.sleep(600)


def start_worker(end: Connection) -> None:
    """As an engine core does."""
    multiprocessing.get_context("spawn").Process(target=work, args=(end,)).start()
    time.sleep(600)


def test_the_workers_of_an_engine_core_end_with_it() -> None:
    """However it ends, and before any of them runs the plugin."""
    context = multiprocessing.get_context("spawn")
    ours, other = context.Pipe()
    with children_end_with_us(), ours, other:
        core = context.Process(target=start_worker, args=(other,))
        core.start()
        worker = Path("/proc", str(ours.recv()))
        core.kill()
        core.join()
    wait_until(lambda: is_gone(worker))


@pytest.mark.parametrize("before", [True, False])
def test_this_process_goes_on_as_before(before: bool) -> None:
    was = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        with suppress(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == before
        collect_again()
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()
