"""A benchmark server on anypoll, a task per connection: nocopy rpc, plain echo."""

from __future__ import annotations

import anyio
from _launch import BACKLOG, HEADER_SIZE, HOST, announce, launch

import anypoll


async def handle_rpc(conn: anypoll.Connection) -> None:
    # The loop ends with the EndOfStream of the first peek after the client has gone, a normal end
    # to the server. The replies go out by themselves, in one batch, when the reader has to wait.
    reader, writer = conn.reader, conn.writer
    while True:
        length = int.from_bytes(await reader.peek(HEADER_SIZE), "big")
        writer.write(await reader.next(HEADER_SIZE + length))


async def handle_echo(conn: anypoll.Connection) -> None:
    async for chunk in conn:
        await conn.send(chunk)


async def serve(workload: str) -> None:
    handler = handle_rpc if workload == "rpc" else handle_echo
    async with anypoll.serve(handler, host=HOST, port=0, backlog=BACKLOG) as server:
        announce(server.port)
        await anyio.sleep_forever()


if __name__ == "__main__":
    launch(serve, ("asyncio", "uvloop", "trio"))
