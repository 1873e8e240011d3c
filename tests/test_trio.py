"""Connections and servers under plain `trio.run`, in nurseries and Trio's scopes. Those that are
Trio's own streams and listeners: test_integrations_trio.py.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

import anyio
import pytest
import trio
import trio.testing
from certificates import client_context, server_context

import anypoll
from anypoll import Connection
from anypoll.mux import ShardQueue

pytestmark = pytest.mark.trio


async def echo(conn: Connection) -> None:
    async for piece in conn:
        await conn.send(piece)


async def test_a_server_in_a_nursery() -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            functools.partial(anypoll.serve_forever, echo, host="127.0.0.1", port=0)
        )
        assert isinstance(server, anypoll.Server)
        async with await anypoll.connect_tcp("127.0.0.1", server.port) as conn:
            await conn.send(b"ping")
            assert await conn.next(4) == b"ping"
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            await stream.send_all(b"from Trio's stream")
            await stream.send_eof()
            assert b"".join([piece async for piece in stream]) == b"from Trio's stream"
        nursery.cancel_scope.cancel()
    assert server.shutting_down


async def test_every_operation_is_a_checkpoint_of_trios() -> None:
    first, second = anypoll.socketpair()
    calls: list[Callable[[], Awaitable[object]]] = [
        functools.partial(first.send, b"x"),
        second.receive,
        functools.partial(first.send, b""),
        first.wait_writable,
        first.send_eof,
        first.send_eof,
    ]
    async with first, second:
        for call in calls:
            while call == second.receive and not len(second.reader):
                await trio.sleep(0.001)
            with trio.testing.assert_checkpoints():
                await call()
        with trio.testing.assert_checkpoints(), pytest.raises(anyio.EndOfStream):
            await second.receive()
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                await first.aclose()


async def test_cancellations_are_trios() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        with trio.move_on_after(0.01) as scope:
            await first.receive()
        assert scope.cancelled_caught
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.01):
            await first.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.receive)
            nursery.start_soon(first.send, bytes(8 << 20))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        await second.send(b"x")
        assert await first.receive() == b"x"


async def test_the_read_timeout_is_real_time(autojump_clock: trio.testing.MockClock) -> None:
    """Trio's clock jumps ahead while tasks wait for a poller; our timeouts do not."""
    first, second = anypoll.socketpair()
    async with first, second:
        first.read_timeout = 0.02
        with pytest.raises(anypoll.ReadTimeout):
            await first.receive()


async def test_a_queue_in_a_nursery() -> None:
    """Many tasks of a nursery write to one connection, and a deadline of Trio's ends the block."""
    first, second = anypoll.socketpair()
    async with first, second:
        async with ShardQueue(first) as queue, trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(queue.add, b"%02d" % number)
        got = bytes(await second.next(200))
        assert sorted(got[at : at + 2] for at in range(0, 200, 2)) == [
            b"%02d" % number for number in range(100)
        ]
        with trio.CancelScope() as scope:
            async with ShardQueue(first) as queue:
                await queue.add(b"sent")
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert await second.next(4) == b"sent"


@pytest.mark.usefixtures("tls_way")
async def test_tls() -> None:
    """A cancel scope of AnyIO's limits its calls, in a Trio run too."""
    first, second = anypoll.socketpair()
    wrap = anypoll.TLSConnection.wrap
    async with first, second:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                options = {"server_side": True, "ssl_context": server_context()}
                nursery.start_soon(functools.partial(wrap, second, **options))
                client = await wrap(first, hostname="anypoll.test", ssl_context=client_context())
            client.read_timeout = client.write_timeout = 0.5
            with pytest.raises(anypoll.ReadTimeout):
                await client.next(1)
            with pytest.raises(anypoll.WriteTimeout):
                await client.send(bytes(4 << 20))
