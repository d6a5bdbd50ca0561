"""Weights on their way into a process of the sampler: in pieces, through memory that both share.

The memory is a file without a name (memfd), as small as two pieces: one is read while the other is
filled. A socket hands it over, tells what each piece holds, and which is free again. It has its
name in Linux's abstract namespace. So nothing of either is in a folder, /dev/shm included, and
nothing is left however the two processes end; each sees the end of the other at once.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from student_trainer.errors import ConfigError

T = TypeVar("T")
PIECE_BYTES = 16 << 20
"""A tensor that is larger comes in several pieces."""
NUM_PIECES = 2
BUFFER_BYTES = NUM_PIECES * PIECE_BYTES
SENDER_GONE = "the sender of the weights has gone"
_LENGTH = struct.Struct("<I")
_FREE = b"\0"
_Bytes: TypeAlias = NDArray[np.uint8]


class Part(TypedDict):
    """Of a tensor, in a piece."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    """Of these bytes in the tensor."""
    num_bytes: int


class WeightBuffer:
    """The sending end; the memory is there from the beginning to `close`."""

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        """Raises ConfigError when the memory cannot be had."""
        size = NUM_PIECES * piece_bytes
        try:
            self._file = os.memfd_create("driftline-weights")
            try:
                os.posix_fallocate(self._file, 0, size)
                memory = mmap.mmap(self._file, size)
            except OSError:
                os.close(self._file)
                raise
        except (OSError, AttributeError) as error:
            raise ConfigError(
                f"{size / 2**20:,.0f} MiB of memory that the sampler's process shares cannot be "
                f"had: {error}; make room, or name a folder for the weights, sampler.weights_dir"
            ) from error
        # Nobody else has the mapping: it ends with them, also where a traceback keeps one a while.
        self._pieces: list[_Bytes] = [*np.frombuffer(memory, np.uint8).reshape(NUM_PIECES, -1)]

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        """There is: it does not depend on the model."""

    async def send(
        self,
        weights: Iterator[tuple[str, Tensor]],
        receive: Callable[[str], Awaitable[T]],
        num_readers: int = 1,
    ) -> T:
        """Calls `receive` with an address, which has so many processes read from it, and returns
        what it returns. What it raises is raised, and what `weights` raises.
        """
        name = f"driftline-weights-{os.getpid()}-{secrets.token_hex(8)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"\0{name}")
            listener.listen(num_readers)
            listener.setblocking(False)
            reading = asyncio.ensure_future(receive(f"@{name}"))
            sending = asyncio.ensure_future(self._send(listener, weights, num_readers))
            try:
                await asyncio.wait({reading, sending}, return_when=asyncio.FIRST_COMPLETED)
                # Why a reader has gone the reader says.
                if sending.done() and not isinstance(sending.exception(), ConnectionError):
                    sending.result()
                return await reading
            finally:
                reading.cancel()
                sending.cancel()
                await asyncio.gather(reading, sending, return_exceptions=True)

    async def _send(
        self, listener: socket.socket, weights: Iterator[tuple[str, Tensor]], num_readers: int
    ) -> None:
        loop = asyncio.get_running_loop()
        parts = _Parts(weights, len(self._pieces[0]))
        with ExitStack() as stack:
            readers: list[socket.socket] = []
            while len(readers) < num_readers:
                reader = stack.enter_context((await loop.sock_accept(listener))[0])
                if _user_of(reader) == os.geteuid():
                    socket.send_fds(reader, [_FREE], [self._file])
                    readers.append(reader)
            for number in count():
                if number >= NUM_PIECES:
                    await _one_is_free(readers)
                held = json.dumps(parts.fill(self._pieces[number % NUM_PIECES])).encode()
                for reader in readers:
                    await loop.sock_sendall(reader, _LENGTH.pack(len(held)) + held)
                if parts.are_all_sent:
                    break
            # A reader that says so to nobody fails.
            for _ in range(min(number, NUM_PIECES - 1)):
                await _one_is_free(readers)

    def close(self) -> None:
        """Frees the memory, once no reader has it."""
        if self._pieces:
            self._pieces.clear()
            os.close(self._file)


async def _one_is_free(readers: Iterable[socket.socket]) -> None:
    """The piece that was sent first of those that are not."""
    for reader in readers:
        if not await asyncio.get_running_loop().sock_recv(reader, 1):
            raise ConnectionResetError("a reader of the weights has gone")


class _Parts:
    """Tensors cut to what a piece holds, one after another."""

    def __init__(self, weights: Iterator[tuple[str, Tensor]], most: int) -> None:
        self._cut = _cut(weights, most)
        self._next: tuple[Part, _Bytes] | None = None
        self.are_all_sent = False

    def fill(self, piece: _Bytes) -> list[Part]:
        """As many as have room; none at the end, which is sent too."""
        held: list[Part] = []
        used = 0
        while (part := self._next or next(self._cut, None)) is not None:
            self._next = part
            if used + len(part[1]) > len(piece):
                return held
            piece[used : used + len(part[1])] = part[1]
            used += len(part[1])
            held.append(part[0])
            self._next = None
        self.are_all_sent = not held
        return held


def _cut(weights: Iterator[tuple[str, Tensor]], most: int) -> Iterator[tuple[Part, _Bytes]]:
    for name, tensor in weights:
        whole = _bytes_of(tensor)
        for start in range(0, max(1, len(whole)), most):
            cut = whole[start : start + most]
            yield (
                Part(
                    name=name,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    shape=[*tensor.shape],
                    start=start,
                    num_bytes=len(cut),
                ),
                cut,
            )


def received(address: str) -> Generator[tuple[str, Tensor], None, None]:
    """The reading end, for the process that got the address: names and tensors, in memory of their
    own. Raises ConnectionError when the sender ends before the weights do."""
    with ExitStack() as stack:
        sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        sender.connect(f"\0{address.removeprefix('@')}")
        _, files, _, _ = socket.recv_fds(sender, 1, 1)
        if not files:
            raise ConnectionAbortedError(SENDER_GONE)
        stack.callback(os.close, files[0])
        memory = stack.enter_context(mmap.mmap(files[0], 0, prot=mmap.PROT_READ))
        yield from _read(sender, memory)


def _read(sender: socket.socket, memory: mmap.mmap) -> Iterator[tuple[str, Tensor]]:
    tensor = torch.empty(0)
    for number in count():
        (length,) = _LENGTH.unpack(_exactly(sender, _LENGTH.size))
        held: list[Part] = json.loads(_exactly(sender, length))
        if not held:
            return
        at = number % NUM_PIECES * (len(memory) // NUM_PIECES)
        whole = []
        for part in held:
            start, num_bytes = part["start"], part["num_bytes"]
            if start == 0:
                tensor = torch.empty(
                    part["shape"], dtype=getattr(torch, part["dtype"]), device="cpu"
                )
            into = _bytes_of(tensor)
            into[start : start + num_bytes] = np.frombuffer(memory, np.uint8, num_bytes, at)
            at += num_bytes
            if start + num_bytes == len(into):
                whole.append((part["name"], tensor))
        sender.sendall(_FREE)
        yield from whole


def _bytes_of(tensor: Tensor) -> _Bytes:
    """A contiguous tensor's own memory."""
    found: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return found  # type: ignore[no-any-return]


def _exactly(sender: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = sender.recv(num_bytes - len(parts))
        if not part:
            raise ConnectionAbortedError(SENDER_GONE)
        parts += part
    return bytes(parts)


def _user_of(connection: socket.socket) -> int:
    """Of the process at the other end: an abstract name has no permissions."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", found)
    return int(user)
