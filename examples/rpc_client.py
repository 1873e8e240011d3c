"""A client for `rpc_server.py`: any number of tasks call over one connection at a time.

Calls are told apart by a number. What tasks send together leaves in one system call, and one task
reads the replies and wakes whoever waits for them. A call that is cancelled disturbs no other one.

Start the server with `anypoll serve examples/rpc_server.py:handler --port 8001`, then run
`python examples/rpc_client.py [PORT]`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
from anyio import BrokenResourceError, EndOfStream, IncompleteRead
from rpc_server import Call, Reply

import anypoll
from anypoll.mux import ShardQueue

calls = msgspec.msgpack.Encoder()
replies = msgspec.msgpack.Decoder(Reply)


class RemoteError(Exception):
    """The server says that a call has failed."""


class Client:
    def __init__(self, conn: anypoll.Connection, queue: ShardQueue) -> None:
        self._conn, self._queue = conn, queue
        self._numbers = itertools.count()
        self._waiting: dict[int, anyio.Event] = {}
        self._replies: dict[int, Reply] = {}

    async def call(self, method: str, *args: Any) -> Any:
        number = next(self._numbers)
        body = calls.encode(Call(number, method, list(args)))
        event = self._waiting[number] = anyio.Event()
        try:
            await self._queue.add(len(body).to_bytes(4, "big"), body)
            await event.wait()
        finally:
            del self._waiting[number]
            reply = self._replies.pop(number, None)
        if reply is None:
            raise ConnectionError("the connection to the server was lost")
        if reply.error is not None:
            raise RemoteError(reply.error)
        return reply.result

    async def receive(self) -> None:
        try:
            while True:
                size = int.from_bytes(await self._conn.next(4), "big")
                reply = replies.decode(await self._conn.next(size))
                if reply.id in self._waiting:  # or the call was cancelled
                    self._replies[reply.id] = reply
                    self._waiting[reply.id].set()
        except (EndOfStream, IncompleteRead, BrokenResourceError):
            self._conn.abort()  # so that later calls fail at once
            for event in self._waiting.values():
                event.set()


@asynccontextmanager
async def connect(host: str, port: int) -> AsyncIterator[Client]:
    conn: anypoll.Connection = await anypoll.connect_tcp(host, port, timeout=5)
    async with conn, ShardQueue(conn) as queue, anyio.create_task_group() as tg:
        client = Client(conn, queue)
        tg.start_soon(client.receive)
        yield client
        tg.cancel_scope.cancel()


async def main(port: int) -> None:
    async with connect("127.0.0.1", port) as client, anyio.create_task_group() as tg:

        async def show(number: int) -> None:
            print(number, "+ 1 =", await client.call("add", number, 1))

        for number in range(10):
            tg.start_soon(show, number)


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8001)
