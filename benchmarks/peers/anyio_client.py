"""A benchmark client on AnyIO's own streams, buffered."""

from __future__ import annotations

import argparse

import anyio
from _client import client_parser, measure
from _launch import HEADER_SIZE, HOST, launch
from anyio.streams.buffered import BufferedByteStream


async def main(options: argparse.Namespace) -> None:
    async with await anyio.connect_tcp(HOST, options.port) as connection:
        stream = BufferedByteStream(connection)

        async def call(request: bytes) -> bytes:
            await stream.send(request)
            header = await stream.receive_exactly(HEADER_SIZE)
            return header + await stream.receive_exactly(int.from_bytes(header, "big"))

        await measure(options, call)


if __name__ == "__main__":
    launch(main, client_parser())
