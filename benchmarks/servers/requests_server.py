"""A benchmark server on anypoll in request mode: no task per connection."""

from __future__ import annotations

import anyio
from _launch import BACKLOG, HEADER_SIZE, HOST, announce, launch

import anypoll


async def on_rpc(conn: anypoll.Connection) -> None:
    reader, writer = conn.reader, conn.writer
    length = int.from_bytes(await reader.peek(HEADER_SIZE), "big")
    writer.write(await reader.next(HEADER_SIZE + length))


async def on_echo(conn: anypoll.Connection) -> None:
    await conn.send(await conn.receive())


async def serve(workload: str) -> None:
    on_request = on_rpc if workload == "rpc" else on_echo
    async with anypoll.serve(on_request=on_request, host=HOST, port=0, backlog=BACKLOG) as server:
        announce(server.port)
        await anyio.sleep_forever()


if __name__ == "__main__":
    launch(serve, ("asyncio", "uvloop", "trio"))
