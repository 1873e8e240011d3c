"""Connections and servers under plain `trio.run`, in nurseries and Trio's scopes. Those that are
Trio's own streams and listeners: test_integrations_trio.py.
"""

from __future__ import annotations

import functools

import anyio
import pytest
import trio
import trio.testing
from certificates import client_context, server_context

import anypoll
from anypoll import Connection
from anypoll.mux import ShardQueue

pytestmark = pytest.mark.trio


async def test_a_nursery() -> None:
    first, second = anypoll.socketpair()
    got: list[bytes] = []

    async def receive() -> None:
        got.extend([piece async for piece in second])

    async with first, second, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await first.send(b"hello")
        await first.send_eof()
    assert b"".join(got) == b"hello"


async def test_a_cancelled_nursery() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.receive)
            nursery.start_soon(second.send, bytes(8 << 20))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        assert first.is_active


async def echo(conn: Connection) -> None:
    async for piece in conn:
        await conn.send(piece)


async def test_serve_forever_in_a_nursery() -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            functools.partial(anypoll.serve_forever, echo, host="127.0.0.1", port=0)
        )
        assert isinstance(server, anypoll.Server)
        async with await anypoll.connect_tcp("127.0.0.1", server.port) as conn:
            await conn.send(b"ping")
            assert await conn.next(4) == b"ping"
        nursery.cancel_scope.cancel()
    assert server.shutting_down


async def test_trios_own_client() -> None:
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream:
            await stream.send_all(b"from Trio's stream")
            await stream.send_eof()
            assert b"".join([piece async for piece in stream]) == b"from Trio's stream"


async def test_every_operation_is_a_checkpoint_of_trios() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        with trio.testing.assert_checkpoints():
            await first.send(b"x")
        while not len(second.reader):
            await trio.sleep(0.001)
        with trio.testing.assert_checkpoints():
            await second.receive()
        with trio.testing.assert_checkpoints():
            await first.send(b"")
        with trio.testing.assert_checkpoints():
            await first.wait_writable()
        with trio.testing.assert_checkpoints():
            await first.send_eof()
        with trio.testing.assert_checkpoints():
            await first.send_eof()
        with trio.testing.assert_checkpoints(), pytest.raises(anyio.EndOfStream):
            await second.receive()
        with trio.testing.assert_checkpoints():
            await first.aclose()
        with trio.testing.assert_checkpoints():
            await first.aclose()


async def test_timeouts_are_trios_scopes() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        with trio.move_on_after(0.01) as scope:
            await first.receive()
        assert scope.cancelled_caught
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.01):
            await first.receive()
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


async def test_tls() -> None:
    """A cancel scope of AnyIO's limits its calls, in a Trio run too."""
    first, second = anypoll.socketpair()
    made: dict[bool, anypoll.TLSConnection] = {}

    async def wrap(conn: anypoll.Connection, server: bool) -> None:
        made[server] = await anypoll.TLSConnection.wrap(
            conn,
            server_side=server,
            hostname=None if server else "anypoll.test",
            ssl_context=server_context() if server else client_context(),
        )

    async with first, second:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wrap, first, False)
                nursery.start_soon(wrap, second, True)
            client, server = made[False], made[True]
            client.read_timeout = server.write_timeout = 0.5
            with pytest.raises(anypoll.ReadTimeout):
                await client.next(1)
            with pytest.raises(anypoll.WriteTimeout):
                await server.send(bytes(4 * 1024 * 1024))
            client.read_timeout = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.reader.next_parts, 4 * 1024 * 1024 + 1)
                client.writer.write(b"word")
                assert await server.next(4) == b"word"
                await server.send(b"!")
