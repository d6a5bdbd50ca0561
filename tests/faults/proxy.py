"""A TCP proxy on loopback that makes a network: late, narrow, in slices, or cut.

Bytes pass in order and unchanged. What is on its way is bounded, so that back-pressure reaches the
sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_PIECE_BYTES = 8192
_MAX_LATE_PIECES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What a connection goes through, in each direction."""

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    """0 for no limit."""
    slice_bytes: int = _PIECE_BYTES
    """Bytes that arrive at a time."""
    slice_pause_s: float = 0.0


@dataclass(slots=True, eq=False)
class Proxy:
    """A listening proxy; `cut` resets what goes through it."""

    address: str
    num_connections: int = 0
    num_bytes: int = 0
    """Bytes passed on, both directions together."""
    silent: bool = False
    """From now on what arrives is lost, and the connections stay open."""
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """Resets every connection: the other ends see no orderly close."""
        for writer in list(self._writers):
            reset(writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection without an orderly close; one that has ended already is left as it is."""
    peer = writer.get_extra_info("socket")
    if peer.fileno() >= 0:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


@asynccontextmanager
async def weather(to: str, conditions: Weather) -> AsyncIterator[Proxy]:
    """A proxy to an address, on a free loopback port."""
    host, port = to.rsplit(":", 1)
    tasks: set[asyncio.Task[None]] = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.num_connections += 1
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except ConnectionError:
            writer.transport.abort()
            return
        both = {writer, back}
        proxy._writers |= both
        try:
            await asyncio.gather(
                _pass_on(reader, back, conditions, proxy),
                _pass_on(there, writer, conditions, proxy),
            )
        finally:
            proxy._writers -= both
            for each in both:
                each.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(connection(reader, writer))
        tasks.add(task)

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy = Proxy(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    try:
        yield proxy
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, conditions: Weather, proxy: Proxy
) -> None:
    loop = asyncio.get_running_loop()
    late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_LATE_PIECES)

    async def deliver() -> None:
        while True:
            due, piece = await late.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not piece:
                writer.write_eof()
                return
            if conditions.bytes_per_s:
                await asyncio.sleep(len(piece) / conditions.bytes_per_s)
            writer.write(piece)
            proxy.num_bytes += len(piece)
            await writer.drain()
            if conditions.slice_pause_s:
                await asyncio.sleep(conditions.slice_pause_s)

    delivering = loop.create_task(deliver())
    try:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(conditions.slice_bytes):
                if proxy.silent:
                    continue
                await late.put((loop.time() + conditions.latency_s, piece))
            await late.put((loop.time() + conditions.latency_s, b""))
            await delivering
    finally:
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)
