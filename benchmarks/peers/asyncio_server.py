"""A benchmark server on asyncio's streams: a coroutine per connection, StreamReader and Writer."""

from __future__ import annotations

import argparse
import asyncio

from _launch import BACKLOG, HEADER_SIZE, HOST, READ_SIZE, announce, launch, tls_context


async def handle_rpc(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            header = await reader.readexactly(HEADER_SIZE)
            payload = await reader.readexactly(int.from_bytes(header, "big"))
            writer.write(header + payload)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def handle_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(READ_SIZE):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def serve(options: argparse.Namespace) -> None:
    handler = handle_rpc if options.workload == "rpc" else handle_echo
    server = await asyncio.start_server(handler, HOST, 0, backlog=BACKLOG, ssl=tls_context(options))
    async with server:
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()


if __name__ == "__main__":
    launch(serve)
