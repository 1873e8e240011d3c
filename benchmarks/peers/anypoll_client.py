"""A benchmark client on anypoll: by its reader, by its streams, or buffered by AnyIO."""

from __future__ import annotations

import argparse

from _client import client_parser, measure
from _launch import HEADER_SIZE, HOST, add_settings, launch
from anyio.streams.buffered import BufferedByteStream

import anypoll


async def by_reader(conn: anypoll.Connection, options: argparse.Namespace) -> None:
    reader, writer = conn.reader, conn.writer

    async def call(request: bytes) -> memoryview:
        writer.write(request)
        await writer.flush()
        length = int.from_bytes(await reader.peek(HEADER_SIZE), "big")
        return await reader.next(HEADER_SIZE + length)

    await measure(options, call)


async def by_streams(conn: anypoll.Connection, options: argparse.Namespace) -> None:
    async def call(request: bytes) -> bytes:
        await conn.send(request)
        answer = await conn.receive()
        while len(answer) < HEADER_SIZE + int.from_bytes(answer[:HEADER_SIZE], "big"):
            answer += await conn.receive()
        return answer

    await measure(options, call)


async def by_buffered_stream(conn: anypoll.Connection, options: argparse.Namespace) -> None:
    stream = BufferedByteStream(conn)

    async def call(request: bytes) -> bytes:
        await stream.send(request)
        header = await stream.receive_exactly(HEADER_SIZE)
        return header + await stream.receive_exactly(int.from_bytes(header, "big"))

    await measure(options, call)


WAYS = {"reader": by_reader, "streams": by_streams, "buffered": by_buffered_stream}


async def main(options: argparse.Namespace) -> None:
    anypoll.configure(**dict(options.configure))
    async with await anypoll.connect_tcp(HOST, options.port) as conn:
        await WAYS[options.way](conn, options)


if __name__ == "__main__":
    parser = client_parser()
    parser.add_argument("--way", choices=tuple(WAYS), required=True)
    add_settings(parser)
    launch(main, parser)
