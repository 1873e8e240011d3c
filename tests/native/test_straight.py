"""receive() where much arrives: the bytes go straight from the socket into the object."""

from __future__ import annotations

import gc
import random
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, EndOfStream
from peers import (
    KIB,
    arrived,
    holds,
    is_waiting,
    opened,
    pattern,
    pollers_have_looked,
    read_all,
    send_all,
    socket_pair,
    within,
)

from anypoll import Connection, ReadTimeout
from anypoll._connection.stream import open_socket
from anypoll._epoll import IS_EOF

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("by_loops")]

PIECE = 64 * KIB


async def come(conn: Connection, peer: socket.socket, data: bytes) -> None:
    """Sends what fits in the kernel's buffer, and returns when it has come there."""
    await send_all(peer, data)
    await holds(lambda: arrived(conn.fileno()) == len(data))


def buffered(conn: Connection) -> int:
    return conn.statistics().buffered_input


async def receive_so_many(conn: Connection, size: int) -> bytes:
    got = b""
    while len(got) < size:
        got += await within(conn.receive())
    return got


async def receive_all(conn: Connection) -> None:
    while True:
        await conn.receive()


async def make_busy(conn: Connection, peer: socket.socket) -> None:
    """Much arrives, and nothing is read ahead any more."""
    data = pattern(4 * PIECE)
    for _ in range(200):  # it depends on how much of it is read at once
        async with anyio.create_task_group() as group:
            group.start_soon(send_all, peer, data)
            assert await conn.reader.read_bytes(len(data)) == data
        with anyio.move_on_after(0):
            await conn.receive()
        await send_all(peer, b"x" * PIECE)
        await holds(lambda: arrived(conn.fileno()) + buffered(conn) == PIECE)
        await pollers_have_looked()
        ahead = buffered(conn) > 0
        assert await receive_so_many(conn, PIECE) == b"x" * PIECE
        if not ahead:
            return
    pytest.fail("it is always read ahead")


@asynccontextmanager
async def busy() -> AsyncIterator[tuple[Connection, socket.socket]]:
    async with opened("tcp") as (conn, peer):
        await make_busy(conn, peer)
        yield conn, peer


@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE])
async def test_what_has_come(size: int) -> None:
    """One read, unless the poller's thread has come first, because the machine is busy."""
    data = pattern(size)
    async with busy() as (conn, peer):
        for _ in range(50):
            await come(conn, peer, data)
            reads = conn.statistics().reads
            assert await conn.receive() == data[:PIECE]
            straight = conn.statistics().reads == reads + 1
            if size > PIECE:
                assert await conn.receive() == data[PIECE:]
            if straight:
                return
    pytest.fail("nothing is received straight")


async def test_it_waits() -> None:
    async with busy() as (conn, peer):
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await conn.receive())

        async with anyio.create_task_group() as group:
            group.start_soon(receive)
            await holds(lambda: is_waiting(conn))
            await send_all(peer, b"late")
        assert got == [b"late"]


@pytest.mark.parametrize("urgent", [False, True], ids=["asked", "urgent"])
async def test_it_waits_and_the_bytes_are_read_ahead(urgent: bool) -> None:
    """Somebody asks what is buffered, or an urgent byte shows that no short read can be trusted."""
    async with busy() as (conn, peer):
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await within(conn.receive(), 5))

        async with anyio.create_task_group() as group:
            group.start_soon(receive)
            await holds(lambda: is_waiting(conn))
            if urgent:
                peer.send(b"late!", socket.MSG_OOB)
            else:
                assert len(conn.reader) == 0
                await send_all(peer, b"late")
        assert got == [b"late"]


async def test_bytes_of_a_call_that_has_not_returned_are_unread() -> None:
    """Whoever waits for `at_eof` would miss them. A call that ends early puts them back."""
    data = pattern(PIECE)
    async with busy() as (conn, peer):
        await come(conn, peer, data)
        call: Any = conn.receive()
        call.send(None)  # to its checkpoint
        assert arrived(conn.fileno()) == 0
        peer.shutdown(socket.SHUT_WR)
        await holds(lambda: conn._core.status() & IS_EOF)
        assert len(conn.reader) == PIECE
        assert not conn.at_eof
        call.close()
        assert len(conn.reader) == PIECE
        assert not conn.at_eof
        assert await receive_so_many(conn, PIECE) == data
        assert conn.at_eof


async def test_no_more_than_was_asked_for() -> None:
    async with busy() as (conn, peer):
        await come(conn, peer, pattern(PIECE))
        assert await conn.receive(1000) == pattern(PIECE)[:1000]
        assert await conn.receive(1 << 40) == pattern(PIECE)[1000:]


async def test_a_cancellation_loses_nothing() -> None:
    async with busy() as (conn, peer):
        await come(conn, peer, pattern(PIECE))
        reads = conn.statistics().reads
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.receive()
        assert scope.cancelled_caught
        call = conn.receive()
        call.send(None)  # the checkpoint
        assert conn.statistics().reads > reads
        call.close()
        assert await conn.receive() == pattern(PIECE)


async def test_closed_at_the_checkpoint() -> None:
    async with busy() as (conn, peer):
        await come(conn, peer, pattern(PIECE))
        async with anyio.create_task_group() as group:
            group.start_soon(conn.aclose)
            with pytest.raises(ClosedResourceError):
                await receive_all(conn)  # Trio shuffles its tasks: the first may be in time


async def test_forgotten_at_the_checkpoint() -> None:
    """The collector may clear the connection before the call that holds its bytes."""
    ours, peer = socket_pair("tcp")
    ours.setblocking(False)
    peer.setblocking(False)
    with peer:
        conn = open_socket(ours)
        await make_busy(conn, peer)
        await come(conn, peer, pattern(PIECE))
        call: Any = conn.receive()
        call.send(None)
        assert buffered(conn) == 0
        conn._core.watcher = call  # any reference will do
        gone = weakref.ref(conn._core)
        del conn, call
        with pytest.warns(ResourceWarning, match="unclosed"):
            gc.collect()
        assert gone() is None


async def test_the_end() -> None:
    async with busy() as (conn, peer):
        await send_all(peer, b"the end")
        peer.shutdown(socket.SHUT_WR)
        assert await within(conn.receive()) == b"the end"
        with pytest.raises(EndOfStream):
            await within(conn.receive())


async def test_timeout() -> None:
    async with busy() as (conn, peer):
        conn.read_timeout = 0.001
        with pytest.raises(ReadTimeout):
            await conn.receive()
        await come(conn, peer, b"in time")
        assert await conn.receive() == b"in time"


async def test_with_a_reader_in_between() -> None:
    async with busy() as (conn, peer):
        await come(conn, peer, b"head" + pattern(PIECE))
        assert await conn.next(4) == b"head"
        assert await receive_so_many(conn, PIECE) == pattern(PIECE)
        await come(conn, peer, b"abc")
        assert len(conn.reader) == 3  # what is asked for is read
        assert await conn.receive() == b"abc"


@pytest.mark.parametrize("seed", range(3))
async def test_at_random(seed: int) -> None:
    """Pieces of all sizes, cancellations, and other calls in between: byte for byte."""
    dice = random.Random(seed)
    data = pattern(6_000_000, seed)
    got = bytearray()
    async with opened("tcp") as (conn, peer), anyio.create_task_group() as group:

        async def send() -> None:
            sent = 0
            while sent < len(data):
                size = dice.choice([1, 1000, 100_000, 500_000])
                await send_all(peer, data[sent : sent + size])
                sent += size
                if dice.random() < 0.3:
                    await anyio.sleep(0)

        group.start_soon(send)
        while len(got) < len(data):
            match dice.randrange(8):
                case 0:
                    got += await conn.next(1)
                case 1:
                    with anyio.move_on_after(0):
                        got += await conn.receive()
                case 2:
                    got += await conn.receive(dice.choice([1, 4096, 1 << 20]))
                case 3:
                    len(conn.reader)
                case _:
                    got += await within(conn.receive())
    assert bytes(got) == data


async def test_an_echo() -> None:
    async with busy() as (conn, peer), anyio.create_task_group() as group:
        data = pattern(1_000_000)

        async def echo() -> None:
            async for chunk in conn:
                await conn.send(chunk)

        group.start_soon(echo)
        group.start_soon(send_all, peer, data)
        assert await read_all(peer, len(data)) == data
        group.cancel_scope.cancel()
