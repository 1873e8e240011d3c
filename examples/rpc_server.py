"""A server for remote calls: framed messages, many calls at a time, answered in any order.

A message is a length of 4 bytes, big-endian, and so many bytes of MessagePack (needs `msgspec`). It
is decoded from where it was received, without a copy. Each call gets a task of its own, and all the
answers go through one `ShardQueue`: whichever are ready together leave in one system call.

Run it with `anypoll serve examples/rpc_server.py:handler --port 8001`, and call it with
`python examples/rpc_client.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
from anyio import EndOfStream

import anypoll
from anypoll.mux import ShardQueue

MESSAGE = 1024 * 1024  # bytes, at most
CALLS = 100  # of one client at a time, at most: above that its next call is not read yet


class Call(msgspec.Struct, array_like=True):
    id: int
    method: str
    args: list[Any]


class Reply(msgspec.Struct, array_like=True):
    id: int
    result: Any = None
    error: str | None = None


async def add(a: float, b: float) -> float:
    return a + b


async def sleep(seconds: float) -> float:
    await anyio.sleep(seconds)
    return seconds


METHODS: dict[str, Callable[..., Awaitable[Any]]] = {"add": add, "sleep": sleep}
calls = msgspec.msgpack.Decoder(Call)
replies = msgspec.msgpack.Encoder()


async def answer(call: Call) -> Reply:
    method = METHODS.get(call.method)
    if method is None:
        return Reply(call.id, error=f"there is no method {call.method!r}")
    try:
        return Reply(call.id, result=await method(*call.args))
    except Exception as exc:  # noqa: BLE001 -- whatever it is, it is the caller's
        return Reply(call.id, error=f"{type(exc).__name__}: {exc}")


async def handler(conn: anypoll.Connection) -> None:
    # fast: without a pause at each call, so that calls that came together are answered together
    limit = anyio.Semaphore(CALLS, fast_acquire=True)

    async def serve(call: Call) -> None:
        try:
            body = replies.encode(await answer(call))
            await queue.add(len(body).to_bytes(4, "big"), body)
        finally:
            limit.release()

    async with ShardQueue(conn) as queue, anyio.create_task_group() as tg:
        while True:
            await limit.acquire()
            try:
                size = int.from_bytes(await conn.next(4), "big")
                if size > MESSAGE:
                    return
                call = calls.decode(await conn.next(size))
            except (EndOfStream, msgspec.DecodeError):
                return  # when the calls that run are answered
            tg.start_soon(serve, call)
