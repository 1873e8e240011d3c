"""A benchmark server on asyncio protocols: no coroutine, one write per batch of received data.

On uvloop this is the fastest that Python is known to do, and so the anchor of the comparison.
"""

from __future__ import annotations

import asyncio
from typing import cast

from _launch import BACKLOG, HEADER_SIZE, HOST, announce, launch


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
    """Each frame is taken apart as a handler would need it; the replies leave together."""

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


async def serve(workload: str) -> None:
    protocol = RpcProtocol if workload == "rpc" else EchoProtocol
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, HOST, 0, backlog=BACKLOG)
    async with server:
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()


if __name__ == "__main__":
    launch(serve, ("asyncio", "uvloop"))
