"""A benchmark client on an asyncio protocol: the callback for an answer sends the next request."""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

from _client import Meter, client_parser
from _launch import HOST, launch


class Client(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._answer = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._meter.begin())

    def data_received(self, data: bytes) -> None:
        if self._answer:
            data = self._answer + data
        if len(data) < self._meter.frame_size:
            self._answer = data
            return
        self._answer = b""
        self._meter.end(data)
        if self._meter.is_running:
            self.transport.write(self._meter.begin())
        else:
            self.done.set_result(self._meter.report())

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or EOFError("the server has closed the connection"))


async def main(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_connection(
        lambda: Client(Meter(options)), HOST, options.port
    )
    print(await client.done, flush=True)
    transport.close()


if __name__ == "__main__":
    launch(main, client_parser())
