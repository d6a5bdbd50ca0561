"""A TCP relay on loopback that resets its connections, for tests of those who must survive it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tests.faults.proxy import reset

_BLOCK_BYTES = 4096


class CutProxy:
    """Relays to one address; each connection is reset after so many bytes, or when told."""

    def __init__(self, target_port: int, bytes_until_cut: Callable[[], int | None]) -> None:
        """`bytes_until_cut` is asked once a connection; None lets it live."""
        self.target_port = target_port
        self.port = 0
        self.num_cut = 0
        """Connections that were reset while they were in use."""
        self._bytes_until_cut = bytes_until_cut
        self._open: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}

    def cut_all(self) -> int:
        """Resets every open connection; returns how many."""
        writers = list(self._open.values())
        for pair in writers:
            self._reset(pair)
        return len(writers)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relays one connection until either side ends it or it is cut."""
        try:
            target_reader, target_writer = await asyncio.open_connection(
                "127.0.0.1", self.target_port
            )
        except OSError:
            writer.transport.abort()  # type: ignore[attr-defined]
            return
        pair = (writer, target_writer)
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = pair
        left = self._bytes_until_cut()

        async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal left
            while block := await source.read(_BLOCK_BYTES):
                if left is not None:
                    # The cut may come in the middle of a frame.
                    block, left = block[:left], max(0, left - len(block))
                sink.write(block)
                await sink.drain()
                if left == 0:
                    self._reset(pair)
                    return

        ways = [
            asyncio.create_task(relay(reader, target_writer)),
            asyncio.create_task(relay(target_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            del self._open[task]
            for end in pair:
                end.transport.abort()  # type: ignore[attr-defined]

    def _reset(self, pair: tuple[asyncio.StreamWriter, ...]) -> None:
        if any(end.transport.is_closing() for end in pair):
            return
        self.num_cut += 1
        for end in pair:
            reset(end)


@asynccontextmanager
async def cut_proxy(
    target_port: int, bytes_until_cut: Callable[[], int | None] = lambda: None
) -> AsyncIterator[CutProxy]:
    """A running relay to a port of this machine."""
    proxy = CutProxy(target_port, bytes_until_cut)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        # Handlers that are cancelled are logged as errors by asyncio; these end by themselves.
        handlers = dict(proxy._open)
        for pair in handlers.values():
            for end in pair:
                end.transport.abort()  # type: ignore[attr-defined]
        if handlers:
            await asyncio.wait(handlers, timeout=5)
