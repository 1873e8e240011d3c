"""A benchmark server on anypoll, in each of the ways in which one can be written.

``reader``: a task per connection, nocopy frames by reader and writer; echo by receive and send.
``streams``: frames split by hand out of what ``receive`` returns, one ``send`` per batch.
``buffered``: AnyIO's ``BufferedByteStream`` over the connection.
``request``: request mode, a plain call per request, no task per connection.
"""

from __future__ import annotations

import argparse
from typing import Any

import anyio
from _frames import Splitter
from _launch import (
    BACKLOG,
    HEADER_SIZE,
    HOST,
    add_settings,
    announce,
    launch,
    server_parser,
    tls_context,
)
from anyio.streams.buffered import BufferedByteStream

import anypoll

# The first read after the client has gone raises EndOfStream, a normal end to the server.


async def read_frames(conn: anypoll.Connection) -> None:
    # The replies go out by themselves, in one batch, when the reader has to wait.
    reader, writer = conn.reader, conn.writer
    while True:
        length = int.from_bytes(await reader.peek(HEADER_SIZE), "big")
        writer.write(await reader.next(HEADER_SIZE + length))


async def split_frames(conn: anypoll.Connection) -> None:
    splitter = Splitter()
    async for data in conn:
        if replies := splitter.answer(data):
            await conn.send(replies)


async def buffer_frames(conn: anypoll.Connection) -> None:
    stream = BufferedByteStream(conn)
    while True:
        header = await stream.receive_exactly(HEADER_SIZE)
        payload = await stream.receive_exactly(int.from_bytes(header, "big"))
        await stream.send(header + payload)


async def answer_frame(conn: anypoll.Connection) -> None:
    reader, writer = conn.reader, conn.writer
    length = int.from_bytes(await reader.peek(HEADER_SIZE), "big")
    writer.write(await reader.next(HEADER_SIZE + length))


async def echo(conn: anypoll.Connection) -> None:
    async for chunk in conn:
        await conn.send(chunk)


async def answer_chunk(conn: anypoll.Connection) -> None:
    await conn.send(await conn.receive())


WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "reader": {"rpc": {"handler": read_frames}, "echo": {"handler": echo}},
    "streams": {"rpc": {"handler": split_frames}},
    "buffered": {"rpc": {"handler": buffer_frames}},
    "request": {"rpc": {"on_request": answer_frame}, "echo": {"on_request": answer_chunk}},
}


async def serve(options: argparse.Namespace) -> None:
    anypoll.configure(**dict(options.configure))
    handling = WAYS[options.way][options.workload]
    async with anypoll.serve(
        **handling, host=HOST, port=0, backlog=BACKLOG, ssl_context=tls_context(options)
    ) as server:
        announce(server.port)
        await anyio.sleep_forever()


if __name__ == "__main__":
    parser = server_parser()
    parser.add_argument("--way", choices=tuple(WAYS), required=True)
    add_settings(parser)
    launch(serve, parser)
