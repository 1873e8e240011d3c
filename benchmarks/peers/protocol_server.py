"""A benchmark server on asyncio protocols: no coroutine, one write per batch of received data.

On uvloop this is the fastest way to serve that Python had, and so the anchor of the comparison.
With ``--aiofastnet`` that package's transports replace those of the loop.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from typing import cast

from _launch import (
    BACKLOG,
    HEADER_SIZE,
    HOST,
    READ_SIZE,
    announce,
    launch,
    server_parser,
    tls_context,
)


class EchoProtocol(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    # A client that does not read must not make the output grow: stop reading from it.
    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class RpcProtocol(EchoProtocol):
    """What Splitter does, without its call: nothing may be said to slow the anchor down."""

    def __init__(self) -> None:
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        replies = []
        start, size = 0, len(data)
        while size - start >= HEADER_SIZE:
            end = start + HEADER_SIZE + int.from_bytes(data[start : start + HEADER_SIZE], "big")
            if end > size:
                break
            replies.append(data[start:end])
            start = end
        self._rest = data[start:]
        if replies:
            self.transport.write(b"".join(replies))


_SHARED = memoryview(bytearray(READ_SIZE))


class SharedBuffer(asyncio.BufferedProtocol):
    """For the transports of asyncio and of aiofastnet, which otherwise allocate 256 KiB for each
    read. glibc takes so much from the kernel and gives it back, at twice the price of all the rest.
    """

    data_received: Callable[[bytes], None]

    def get_buffer(self, _size_hint: int) -> memoryview:
        return _SHARED

    def buffer_updated(self, size: int) -> None:
        self.data_received(bytes(_SHARED[:size]))


class BufferedEchoProtocol(SharedBuffer, EchoProtocol):
    pass


class BufferedRpcProtocol(SharedBuffer, RpcProtocol):
    pass


async def serve(options: argparse.Namespace) -> None:
    if options.loop == "uvloop" and not options.aiofastnet:
        protocol = RpcProtocol if options.workload == "rpc" else EchoProtocol
    else:
        protocol = BufferedRpcProtocol if options.workload == "rpc" else BufferedEchoProtocol
    loop, context = asyncio.get_running_loop(), tls_context(options)
    if options.aiofastnet:
        import aiofastnet  # noqa: PLC0415 - needed for this peer only

        server = await aiofastnet.create_server(
            loop, protocol, HOST, 0, backlog=BACKLOG, ssl=context
        )
    else:
        server = await loop.create_server(protocol, HOST, 0, backlog=BACKLOG, ssl=context)
    async with server:
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()


if __name__ == "__main__":
    parser = server_parser()
    parser.add_argument("--aiofastnet", action="store_true")
    launch(serve, parser)
