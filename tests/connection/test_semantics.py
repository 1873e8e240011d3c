"""The exact semantics of AnyIO's streams that are easily lost, where no other file has them."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint
from peers import (
    KIB,
    MIB,
    arrive,
    holds,
    opened,
    reset,
    send_until_full,
    served,
    within,
)

import anypoll
from anypoll import Connection, _epoll

pytestmark = pytest.mark.anyio

Call = Callable[[Connection], Awaitable[Any]]

# --- no read-ahead without bound before the first receive() --------------------------------------


@asynccontextmanager
async def made(how: str) -> AsyncIterator[tuple[Connection, socket.socket]]:
    """A connection that was made in some way, and its plain peer."""
    async with AsyncExitStack() as stack:
        if how in {"from_socket tcp", "from_socket unix"}:
            yield await stack.enter_async_context(opened(how.split()[1]))
        elif how == "serve":
            yield await stack.enter_async_context(served())
        elif how == "accept":
            multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
            await stack.enter_async_context(multi)
            address = ("127.0.0.1", multi.extra(SocketAttribute.local_port))
            peer = stack.enter_context(socket.create_connection(address))
            peer.setblocking(False)
            conn = await within(multi.listeners[0].accept())
            yield await stack.enter_async_context(conn), peer
        else:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            conn = await anypoll.connect_tcp(*server.getsockname())
            await stack.enter_async_context(conn)
            peer = stack.enter_context(server.accept()[0])
            peer.setblocking(False)
            yield conn, peer


@pytest.mark.parametrize(
    "how", ["from_socket tcp", "from_socket unix", "serve", "accept", "dialled"]
)
async def test_no_read_ahead_without_bound_before_the_first_receive(how: str) -> None:
    """AnyIO's own accepted streams take 256 MiB from a peer before anybody has asked for a byte."""
    async with made(how) as (conn, peer):
        sent = await send_until_full(conn, peer, bytes(64 * MIB))
        assert sent < 32 * MIB
        assert 256 * KIB <= len(conn.reader) <= 512 * KIB


async def test_the_bound_of_the_read_ahead_is_an_option() -> None:
    async with served(read_high_water=4 * KIB) as (conn, peer):
        await send_until_full(conn, peer, bytes(64 * MIB))
        assert 4 * KIB <= len(conn.reader) <= 8 * KIB


# --- causes are preserved ------------------------------------------------------------------------

READS: dict[str, Call] = {
    "receive": lambda conn: conn.receive(),
    "next": lambda conn: conn.next(5),
    "peek": lambda conn: conn.reader.peek(5),
    "skip": lambda conn: conn.skip(5),
    "until": lambda conn: conn.until(b"\n"),
    "iteration": lambda conn: conn.__anext__(),
}
WRITES: dict[str, Call] = {
    "send": lambda conn: conn.send(b"x"),
    "flush": lambda conn: conn.writer.flush(),
    "send_eof": lambda conn: conn.send_eof(),
}


@pytest.mark.parametrize("call", READS.values(), ids=READS)
async def test_the_cause_of_a_failed_read_is_preserved(call: Call) -> None:
    async with opened("tcp") as (conn, peer):
        reset(peer)
        for _ in range(2):
            with pytest.raises(BrokenResourceError) as caught:
                await within(call(conn))
            assert isinstance(caught.value.__cause__, ConnectionResetError)
            assert caught.value.__cause__.errno == errno.ECONNRESET


@pytest.mark.parametrize("call", WRITES.values(), ids=WRITES)
async def test_the_cause_of_a_failed_write_is_preserved(call: Call) -> None:
    async with opened("tcp") as (conn, peer):
        conn.writer.write(b"pending")
        reset(peer)
        await holds(lambda: not conn.is_active)
        with pytest.raises(BrokenResourceError) as caught:
            await within(call(conn))
        assert isinstance(caught.value.__cause__, (ConnectionResetError, BrokenPipeError))


async def test_to_send_nothing_fails_too_once_the_connection_has_broken() -> None:
    async with opened("tcp") as (conn, peer):
        reset(peer)
        await holds(lambda: not conn.is_active)
        with pytest.raises(BrokenResourceError) as caught:
            await conn.send(b"")
        assert isinstance(caught.value.__cause__, ConnectionResetError)


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETDOWN])
async def test_the_cause_says_what_the_kernel_said(error: int) -> None:
    async with opened("tcp") as (conn, peer):
        try:
            _epoll.set_fault("READ", error, times=-1)
            peer.send(b"x")
            with pytest.raises(BrokenResourceError) as caught:
                await within(conn.receive())
        finally:
            _epoll.clear_faults()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == error


# --- whoever comes second is told so -------------------------------------------------------------

READING = "Another task is already reading from this resource"
WRITING = "Another task is already writing to this resource"
ACCEPTING = "Another task is already accepting connections from this resource"


@pytest.mark.parametrize("first", READS.values(), ids=READS)
@pytest.mark.parametrize("second", READS.values(), ids=READS)
async def test_busy_texts_of_readers_are_anyios(first: Call, second: Call) -> None:
    async with opened() as (conn, peer), anyio.create_task_group() as group:
        group.start_soon(first, conn)
        await holds(lambda: conn._core._reading)
        with pytest.raises(BusyResourceError) as caught:
            await second(conn)
        assert str(caught.value) == READING == str(BusyResourceError("reading from"))
        await arrive(conn, peer, b"12345\n")


@pytest.mark.parametrize("name", [*WRITES, "wait_writable"])
async def test_busy_texts_of_writers_are_anyios(name: str) -> None:
    async with opened() as (conn, _), anyio.create_task_group() as group:
        group.start_soon(conn.send, bytes(16 * MIB))
        await holds(lambda: conn._core._writing)
        with pytest.raises(BusyResourceError) as caught:
            await {**WRITES, "wait_writable": Connection.wait_writable}[name](conn)
        assert str(caught.value) == WRITING == str(BusyResourceError("writing to"))
        group.cancel_scope.cancel()


async def test_busy_texts_of_accepting_are_anyios() -> None:
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        async with anyio.create_task_group() as group:
            group.start_soon(listener.accept)
            await checkpoint()
            await checkpoint()
            with pytest.raises(BusyResourceError) as caught:
                await listener.accept()
            assert str(caught.value) == ACCEPTING
            group.cancel_scope.cancel()


# --- the end of the stream stays, and the close beats all ----------------------------------------


@pytest.mark.parametrize("call", READS.values(), ids=READS)
async def test_the_end_of_the_stream_is_sticky(call: Call) -> None:
    async with opened() as (conn, peer):
        peer.shutdown(socket.SHUT_WR)
        for _ in range(3):
            with pytest.raises((EndOfStream, StopAsyncIteration)):
                await within(call(conn))
            assert conn.at_eof


@pytest.mark.parametrize("before", ["end", "reset", "idle"])
@pytest.mark.parametrize("call", [*READS.values(), *WRITES.values()], ids=[*READS, *WRITES])
async def test_after_the_own_close_everything_says_closed(before: str, call: Call) -> None:
    """Whatever was seen before."""
    async with opened("tcp") as (conn, peer):
        if before == "end":
            peer.shutdown(socket.SHUT_WR)
            with pytest.raises(EndOfStream):
                await within(conn.receive())
        elif before == "reset":
            reset(peer)
            with pytest.raises(BrokenResourceError):
                await within(conn.receive())
        else:
            conn.idle_timeout = 0
            with pytest.raises(anypoll.IdleTimeout):
                await within(conn.receive())
        await conn.aclose()
        with pytest.raises(ClosedResourceError):
            await call(conn)
