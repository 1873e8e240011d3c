"""A TCP gateway: forwards each connection to another address, and what is said there back.

  - Half-close: when one end has said all, the other is told so, and can still go on.
  - Backpressure: who sends faster than the other end reads is slowed down, in both directions. The
    gateway holds some hundred KiB of a connection, never more.
  - Timeouts: for connecting, for an end that takes nothing, and for one that is silent altogether.
  - Blocks are moved from one end to the other, and no byte is copied.

Run it with `python examples/gateway.py PORT TARGET_HOST TARGET_PORT`.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream

import anypoll

CONNECT, WRITE, IDLE = 5.0, 30.0, 300.0  # seconds
LARGEST = 256 * 1024  # bytes that are moved at a time


async def forward(source: anypoll.Connection, target: anypoll.Connection) -> None:
    """One direction. When either end breaks or stalls, both are given up."""
    reader, writer = source.reader, target.writer
    try:
        with suppress(EndOfStream):
            while True:
                await reader.peek(1)
                writer.append(await reader.slice(min(len(reader), LARGEST)))
                await writer.flush()
        await target.send_eof()
    except (BrokenResourceError, ClosedResourceError, TimeoutError):
        source.abort()
        target.abort()


class Gateway:
    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    async def handler(self, conn: anypoll.Connection) -> None:
        try:
            target: anypoll.Connection = await anypoll.connect_tcp(
                self.host, self.port, timeout=CONNECT, write_timeout=WRITE
            )
        except OSError:  # refused, unreachable, or too late: a ConnectTimeout is one too
            conn.abort()
            return
        target.idle_timeout = conn.idle_timeout
        async with target, anyio.create_task_group() as tg:
            tg.start_soon(forward, conn, target)
            tg.start_soon(forward, target, conn)


async def main(port: int, host: str, target_port: int) -> None:
    gateway = Gateway(host, target_port)
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anypoll.serve(
            gateway.handler, host="127.0.0.1", port=port, write_timeout=WRITE, idle_timeout=IDLE
        ) as server:
            print(f"Listening on port {server.port}", flush=True)
            async for _ in signals:
                break


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
