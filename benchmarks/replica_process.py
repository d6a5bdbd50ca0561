"""Serves the replicas of wire shapes over HTTP: GET /<shape>/<k> encodes a table anew.

python -m benchmarks.replica_process --tokens 512 --k 16 32
    prints the address, serves until standard input ends
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
import uvloop

from benchmarks.stored_rows import made_table
from benchmarks.teacher_process import until_stdin_ends
from benchmarks.wire_shapes import SHAPES

Send = Callable[[dict[str, Any]], Awaitable[None]]


def application(num_tokens: int, ks: list[int]) -> Callable[..., Awaitable[None]]:
    """A bare ASGI application: no framework's cost falls on a replica."""
    tables = {k: made_table(num_tokens, k) for k in ks}
    shapes = {shape.name: shape for shape in SHAPES}

    async def answer(scope: dict[str, Any], receive: object, send: Send) -> None:
        name, k = scope["path"].strip("/").split("/")
        table = tables[int(k)]
        body = shapes[name].encode(table.rows, table.token_ids)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(f"http://{host}:{port}", flush=True)


async def _serve(num_tokens: int, ks: list[int]) -> None:
    config = uvicorn.Config(
        application(num_tokens, ks),
        host="127.0.0.1",
        port=0,
        log_config=None,
        access_log=False,
        lifespan="off",
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve())
    await until_stdin_ends()
    server.should_exit = True
    await serving


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replica_process")
    parser.add_argument("--tokens", type=int, required=True, help="rows a table")
    parser.add_argument("--k", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(arguments.tokens, arguments.k))


if __name__ == "__main__":
    main()
