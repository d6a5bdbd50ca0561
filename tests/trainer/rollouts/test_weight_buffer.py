"""Weights come whole through a memory smaller than they are, and an end of one side is one of both.

Run: python -m pytest tests/trainer/rollouts/test_weight_buffer.py

The readers are processes, as an engine is.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from student_trainer.errors import ConfigError
from student_trainer.rollouts.weight_buffer import BUFFER_BYTES, WeightBuffer, received
from tests.waiting import LIMIT_S

T = TypeVar("T")
PIECE = 1000
FORKS = multiprocessing.get_context("forkserver")
"""What starts them has imported torch for all of them."""
FORKS.set_forkserver_preload(["pytest", "student_trainer.rollouts.weight_buffer"])


def reads(address: str, out: Path, error: Path, user: int | None) -> None:
    """A reader: writes what it has read, or why it has not."""
    with out.open("w") as told, error.open("w") as refused:
        if user is not None:
            os.setuid(user)
        try:
            kept = list(received(address))
        except ConnectionError as failed:
            refused.write(f"{type(failed).__name__}: {failed}")
            refused.flush()
            sys.exit(1)
        told.writelines(f"{line(name, tensor)}\n" for name, tensor in kept)


def sends(told: Connection) -> None:
    """A sender that goes on for good."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        while True:
            yield "w", torch.ones(100)

    async def tells(address: str) -> None:
        told.send(address)
        await asyncio.Event().wait()

    asyncio.run(WeightBuffer(1000).send(weights(), tells))


def has_too_little(told: Connection) -> None:
    """What is said where a file may have one megabyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        WeightBuffer()
    except ConfigError as error:
        told.send(str(error))


def line(name: str, tensor: Tensor) -> str:
    """What a reader says of a tensor."""
    told = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{name} {tensor.dtype} {[*tensor.shape]} {hashlib.sha256(told).hexdigest()}"


def tensors() -> dict[str, Tensor]:
    """Larger than a piece, exactly one, empty, without a dimension, in several arithmetics."""
    torch.manual_seed(0)
    return {
        "large": torch.randn(40, 50),
        "bfloat16": torch.randn(7, 3).bfloat16(),
        "piece": torch.randn(PIECE // 4),
        "empty": torch.empty(0, 5),
        "bare": torch.tensor(3.5),
        "flags": torch.tensor([True, False, True]),
        "counts": torch.arange(1000),
        "last": torch.randn(3),
    }


class Reader:
    """A process that reads, as `receive` of the sender; it raises what that process ended with."""

    def __init__(self, folder: Path, user: int | None = None) -> None:
        self._user = user
        self._files = folder / f"{id(self)}.out", folder / f"{id(self)}.err"
        self.process: BaseProcess | None = None

    async def __call__(self, address: str) -> None:
        self.begin(address)
        if code := await self.ended():
            raise RuntimeError(self.error or f"ended by {code}")

    def begin(self, address: str) -> None:
        self.process = FORKS.Process(target=reads, args=(address, *self._files, self._user))
        self.process.start()

    async def ended(self) -> int | None:
        assert self.process is not None
        await asyncio.to_thread(self.process.join, LIMIT_S)
        return self.process.exitcode

    @property
    def said(self) -> list[str]:
        return self._files[0].read_text().splitlines()

    @property
    def error(self) -> str:
        return self._files[1].read_text().strip()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """Of what starts them neither, for whoever looks at this process's children afterwards."""
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[list[Reader]]:
    """Two, and one of another user; all have ended after the test."""
    made = [Reader(tmp_path), Reader(tmp_path), Reader(tmp_path, 65534)]
    yield made
    for reader in made:
        if reader.process is not None:
            reader.process.kill()
            reader.process.join()


@pytest.fixture
def reader(readers: list[Reader]) -> Reader:
    return readers[0]


@pytest.fixture
def buffer() -> Iterator[WeightBuffer]:
    made = WeightBuffer(PIECE)
    yield made
    made.close()


async def within(limited: Awaitable[T]) -> T:
    """A hang is a failure."""
    async with asyncio.timeout(LIMIT_S):
        return await limited


async def test_every_bit_arrives_again_and_again_in_memory_of_its_own(
    buffer: WeightBuffer, readers: list[Reader]
) -> None:
    for reader in readers[:2]:
        await within(buffer.send(iter(tensors().items()), reader))
        assert reader.error == ""
        assert reader.said == [line(name, tensor) for name, tensor in tensors().items()]


async def test_no_weights_are_none(buffer: WeightBuffer, reader: Reader) -> None:
    await within(buffer.send(iter([]), reader))
    assert reader.said == []


async def test_several_processes_read_the_same(buffer: WeightBuffer, readers: list[Reader]) -> None:
    async def both(address: str) -> None:
        await asyncio.gather(*(reader(address) for reader in readers[:2]))

    await within(buffer.send(iter(tensors().items()), both, 2))
    assert readers[0].said == readers[1].said
    assert len(readers[0].said) == len(tensors())


async def test_what_the_receiver_returns_is_returned_though_it_reads_no_more(
    buffer: WeightBuffer,
) -> None:
    async def reads_one(address: str) -> str:
        weights = received(address)
        name, _ = await asyncio.to_thread(next, weights)
        weights.close()
        return name

    assert await within(buffer.send(iter(tensors().items()), reads_one)) == "large"


@pytest.mark.parametrize("killed_at", [0, 100])
async def test_a_reader_that_is_killed_ends_the_sending(
    buffer: WeightBuffer, reader: Reader, killed_at: int
) -> None:
    def weights() -> Iterator[tuple[str, Tensor]]:
        for number in range(1_000_000_000):
            if number == killed_at:
                reader.kill()
            yield f"w{number}", torch.ones(100)

    with pytest.raises(RuntimeError, match="ended by -9"):
        await within(buffer.send(weights(), reader))


async def test_a_receiver_that_fails_before_it_reads_is_what_is_raised(
    buffer: WeightBuffer,
) -> None:
    async def fails(address: str) -> None:
        raise KeyError(address[:1])

    with pytest.raises(KeyError, match="@"):
        await within(buffer.send(iter(tensors().items()), fails))


async def test_weights_that_fail_midway_are_what_is_raised_and_the_reader_ends(
    buffer: WeightBuffer, reader: Reader
) -> None:
    def weights() -> Iterator[tuple[str, Tensor]]:
        yield from tensors().items()
        raise MemoryError("no more of them")

    with pytest.raises(MemoryError, match="no more of them"):
        await within(buffer.send(weights(), reader))
    assert await reader.ended() == 1
    # Any ConnectionError: it says that a piece is free to nobody, or hears no more.
    assert reader.error.startswith(("Connection", "BrokenPipe"))


async def test_a_sending_that_is_cancelled_ends_the_reader(
    buffer: WeightBuffer, reader: Reader
) -> None:
    begun = asyncio.Event()

    def weights() -> Iterator[tuple[str, Tensor]]:
        while True:
            yield "w", torch.ones(100)
            begun.set()

    sending = asyncio.ensure_future(buffer.send(weights(), reader))
    await within(begun.wait())
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(sending)
    assert await reader.ended() == 1


def test_a_sender_that_is_killed_ends_the_reader_and_leaves_nothing() -> None:
    before = {*os.listdir("/dev/shm")}
    told, telling = FORKS.Pipe(duplex=False)
    sender = FORKS.Process(target=sends, args=(telling,))
    sender.start()
    try:
        weights = received(told.recv())
        assert next(weights)[0] == "w"
        assert not {name for name in {*os.listdir("/dev/shm")} - before if "driftline" in name}
        sender.kill()
        sender.join(LIMIT_S)
        with pytest.raises(ConnectionError):
            list(weights)
        assert f"driftline-weights-{sender.pid}" not in Path("/proc/net/unix").read_text()
    finally:
        sender.kill()
        sender.join()
        told.close()
        telling.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_another_user_is_told_nothing(buffer: WeightBuffer, readers: list[Reader]) -> None:
    reader, _, another = readers

    async def both(address: str) -> None:
        another.begin(address)
        await reader(address)

    await within(buffer.send(iter(tensors().items()), both))
    assert await another.ended() == 1
    assert another.said == []
    assert "Connection" in another.error
    assert len(reader.said) == len(tensors())


def test_memory_that_cannot_be_had_is_refused_with_size_and_remedy() -> None:
    told, telling = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=has_too_little, args=(telling,))
    process.start()
    telling.close()
    with told:
        said = told.recv()
    process.join(LIMIT_S)
    assert said.startswith("32 MiB of memory that the sampler's process shares cannot be had: ")
    assert "File too large" in said
    assert "sampler.weights_dir" in said


def test_a_system_without_such_memory_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match=r"cannot be had: .*sampler\.weights_dir"):
        WeightBuffer()


def shared_bytes() -> int:
    """Of the memories for weights that this process has open."""
    found = {}
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if "driftline-weights" in os.readlink(file):
                found[file.stat().st_ino] = file.stat().st_size
    return sum(found.values())


def test_the_memory_is_bounded_and_goes_when_it_is_closed() -> None:
    before = shared_bytes()
    buffer = WeightBuffer()
    assert shared_bytes() - before == BUFFER_BYTES <= 256 << 20
    buffer.close()
    buffer.close()
    assert shared_bytes() == before
