"""An HTTP/2 peer made of bare frames, for what no gRPC library lets one do wrong.

It completes the settings and then does only what it is told: it answers pings or does not, sends
pings of its own, opens no streams. Both a client and a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1
MAX_CONCURRENT_STREAMS = 3


def frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """A frame of the connection itself, stream 0."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4) + payload


class Peer:
    """One connection and what has arrived on it."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers_pings: bool
    ) -> None:
        self._reader, self._writer = reader, writer
        self._answers_pings = answers_pings
        self.num_pings = 0
        self.settings: dict[int, int] = {}
        self.goaway = ""
        """The words of the other side's GOAWAY."""
        self.closed = asyncio.Event()
        """The other side has ended the connection."""
        self.settled = asyncio.Event()
        """The other side has sent its settings."""

    async def read(self) -> None:
        """Takes frames until the connection ends."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3]))
                self._take(head[3], head[4], payload)
        self.closed.set()

    def _take(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self.settings.update(struct.iter_unpack(">HI", payload))
            self._writer.write(frame(SETTINGS, ACK))
            self.settled.set()
        elif kind == PING and not flags & ACK:
            self.num_pings += 1
            if self._answers_pings:
                self._writer.write(frame(PING, ACK, payload))
        elif kind == GOAWAY:
            self.goaway = payload[8:].decode(errors="replace") or "no words"

    async def ping(self, times: int, pause_s: float) -> None:
        """Sends pings of its own."""
        for _ in range(times):
            self._writer.write(frame(PING, 0, bytes(8)))
            await asyncio.sleep(pause_s)


@asynccontextmanager
async def h2_client(address: str, *, answers_pings: bool) -> AsyncIterator[Peer]:
    """Connects to a server and opens no stream."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + frame(SETTINGS))
    peer = Peer(reader, writer, answers_pings=answers_pings)
    reading = asyncio.create_task(peer.read())
    try:
        yield peer
    finally:
        reading.cancel()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await asyncio.gather(reading, return_exceptions=True)


class H2Server:
    """Takes connections and answers no request."""

    def __init__(self, *, answers_pings: bool) -> None:
        self._answers_pings = answers_pings
        self.connected: asyncio.Queue[Peer] = asyncio.Queue()
        self.address = ""
        self.tasks: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Called for each connection."""
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self.tasks.add(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readexactly(len(PREFACE))
        writer.write(frame(SETTINGS))
        peer = Peer(reader, writer, answers_pings=self._answers_pings)
        self.connected.put_nowait(peer)
        try:
            await peer.read()
        finally:
            writer.close()


@asynccontextmanager
async def h2_server(*, answers_pings: bool) -> AsyncIterator[H2Server]:
    """Listens on a free loopback port."""
    server = H2Server(answers_pings=answers_pings)
    listener = await asyncio.start_server(server.accept, "127.0.0.1", 0)
    server.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        for task in server.tasks:
            task.cancel()
        await asyncio.gather(*server.tasks, return_exceptions=True)
