"""What all calls of a connection have in common: how they end, who is told that he comes second,
and when other tasks get their turn. The tables of calls are in calls.py.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
    IncompleteRead,
)
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint
from calls import EXACT, FLUSHES, NOWAIT, READS, SENDS, WRITES, all_raise, called
from peers import (
    KIB,
    MIB,
    arrive,
    at_once,
    blocked,
    holds,
    opened,
    reset,
    send_all,
    send_until_full,
    served,
    within,
)

import anypoll
from anypoll import Connection, IdleTimeout, ReadTimeout, _epoll

pytestmark = pytest.mark.anyio

ENDS = {
    "end": EndOfStream,
    "reset": BrokenResourceError,
    "idle": IdleTimeout,
    "aclose": ClosedResourceError,
    "abort": ClosedResourceError,
    "detach": ClosedResourceError,
}


async def bring_about(end: str, conn: Connection, peer: socket.socket) -> None:
    if end == "end":
        peer.shutdown(socket.SHUT_WR)
    elif end == "reset":
        reset(peer)
    elif end == "idle":
        conn.idle_timeout = 0.001
    elif end == "detach":
        conn.detach()[0].close()
    else:
        await called(getattr(conn, end))


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("end", ENDS)
async def test_every_call_tells_of_the_end(end: str, kind: str) -> None:
    """L04, L12, O8: again and again, and the own close beats whatever was seen before."""
    if (end, kind) == ("reset", "unix"):
        pytest.skip("UNIX sockets have no RST")
    async with opened(kind) as (conn, peer):
        await bring_about(end, conn, peer)
        await holds(lambda: conn.at_eof if end == "end" else not conn.is_active)
        assert conn.at_eof == (end == "end")
        calls = READS | NOWAIT | WRITES
        if end == "reset":
            del calls["wait_writable"]  # there is nothing to wait for
        if end == "end":
            assert await conn.reader.readinto(bytearray(2)) == 0
            calls = {name: call for name, call in (READS | NOWAIT).items() if name != "readinto"}
        cause = ConnectionResetError if end == "reset" else None
        for _ in range(2):
            await all_raise(calls, (ENDS[end], StopAsyncIteration), conn, cause=cause)
        assert (conn.fileno() >= 0) == (ENDS[end] is not ClosedResourceError)
        if end == "end":
            conn.writer.write(b"it gets its answer")
            await conn.send_eof()
            await all_raise(SENDS, ClosedResourceError, conn)
        await conn.aclose()
        await all_raise(READS | NOWAIT | WRITES, ClosedResourceError, conn)
        conn.reader.release()
        assert len(conn.reader) == len(conn.writer) == conn.writer.malloc_len == 0


async def test_a_reset_with_output_pending() -> None:
    async with opened("tcp") as (conn, peer):
        conn.writer.write(b"pending")
        reset(peer)
        await holds(lambda: not conn.is_active)
        await all_raise(SENDS, BrokenResourceError, conn, cause=OSError)
        await all_raise({"flush": FLUSHES["flush"]}, BrokenResourceError, conn, cause=OSError)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("end", [end for end in ENDS if end != "detach"])
async def test_an_end_wakes_who_waits(end: str, kind: str) -> None:
    """L08, L12, L19: the reader and the writer together."""
    if (end, kind) == ("reset", "unix"):
        pytest.skip("UNIX sockets have no RST")

    async def flush() -> None:
        conn.writer.write(bytes(16 * MIB))
        await conn.writer.flush()

    async def send_eof() -> None:
        conn.writer.write(bytes(16 * MIB))
        await conn.send_eof()

    for read, write in (
        (lambda: conn.receive(2), lambda: conn.send(bytes(16 * MIB))),
        (lambda: conn.next(2), flush),
        (lambda: conn.until(b"\n"), send_eof),
        (lambda: conn.reader.next_parts(2), flush),
    ):
        async with opened(kind) as (conn, peer), blocked(read) as got, blocked(write) as sent:
            await bring_about(end, conn, peer)
            await holds(lambda: got)
            if end == "end":
                assert not sent  # half-close is no close
                conn.abort()
        assert type(got[0]) is ENDS[end]
        assert type(sent[0]) is (ClosedResourceError if end == "end" else ENDS[end])
        if end == "reset":
            assert got[0].__cause__.errno == errno.ECONNRESET
            assert isinstance(sent[0].__cause__, OSError)


@pytest.mark.parametrize("end", ["aclose", "abort", "idle"])
async def test_an_end_wakes_who_waits_for_room(end: str) -> None:
    """Behind a send that was given up."""
    for call in (Connection.wait_writable, lambda conn: conn.send(b"more")):
        async with opened() as (conn, peer):
            async with blocked(lambda: conn.send(bytes(16 * MIB)), cancel=True):
                pass
            async with blocked(lambda: call(conn)) as outcome:  # noqa: B023
                await bring_about(end, conn, peer)
            assert type(outcome[0]) is ENDS[end]
            assert conn.statistics().buffered_output == 0


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_what_came_before_the_end_is_read_first(kind: str) -> None:
    """L10, O12: with the error that says whether there may have been more."""
    for end, error in (("end", IncompleteRead), ("reset", BrokenResourceError)):
        if (end, kind) == ("reset", "unix"):
            continue
        async with opened(kind) as (conn, peer):
            await arrive(conn, peer, b"a")
            await bring_about(end, conn, peer)
            await all_raise(EXACT, error, conn)
            assert not conn.at_eof
            assert len(conn.reader) == 1
            assert await conn.receive() == b"a"
            await all_raise(EXACT, ENDS[end], conn)


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


@pytest.mark.parametrize("first", ["receive", "next", "until"])
async def test_two_readers(first: str) -> None:
    """The second is told in AnyIO's words, also if its bytes are there, and disturbs nothing."""
    async with opened() as (conn, peer):
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "receive": conn.receive,
            "next": lambda: conn.next(4),
            "until": lambda: conn.until(b"d"),
        }
        if first != "receive":
            await arrive(conn, peer, b"abc")
            assert await conn.peek(3) == b"abc"
        async with blocked(calls[first]) as outcome:
            text = f"^{BusyResourceError('reading from')}$"
            await all_raise(READS | NOWAIT, BusyResourceError, conn, match=text)
            with pytest.raises(BusyResourceError, match=text):
                conn.detach()
            assert not outcome
            await send_all(peer, b"d" if first != "receive" else b"abcd")
        assert outcome == [b"abcd"]
        for call in (READS | NOWAIT).values():  # and now they may
            await arrive(conn, peer, b"ab")
            await called(call, conn)
            await conn.skip(len(conn.reader))


async def test_two_readers_while_one_takes_a_checkpoint() -> None:
    """The first finds its bytes, but has to let other tasks run before."""
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"ab")
        for _ in range(64):
            at_once(conn.peek(2))
        first = conn.next(2)
        first.send(None)  # type: ignore[attr-defined]
        await all_raise(READS | NOWAIT, BusyResourceError, conn)
        first.close()  # type: ignore[attr-defined]
        assert await within(conn.next(2)) == b"ab"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("first", ["send", "flush", "send_eof"])
async def test_two_writers(kind: str, first: str) -> None:
    """L36: in AnyIO's words."""
    data = bytes(16 * MIB)
    async with opened(kind) as (conn, peer):
        if first != "send":
            conn.writer.write(data)
        call = (lambda: conn.send(data)) if first == "send" else (lambda: FLUSHES[first](conn))
        async with blocked(call) as outcome:
            calls = FLUSHES | {name: SENDS[name] for name in ("send", "send nothing")}
            text = f"^{BusyResourceError('writing to')}$"
            await all_raise(calls, BusyResourceError, conn, match=text)
            with pytest.raises(BusyResourceError, match=text):
                conn.detach()
            assert not outcome
            left = len(data)
            while left:
                await anyio.wait_readable(peer)
                left -= len(peer.recv(left))
        assert outcome == [None]


async def test_two_that_accept() -> None:
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        async with anyio.create_task_group() as group:
            group.start_soon(listener.accept)
            await checkpoint()
            await checkpoint()
            with pytest.raises(BusyResourceError) as caught:
                await listener.accept()
            assert str(caught.value) == str(BusyResourceError("accepting connections from"))
            group.cancel_scope.cancel()


# --- waits that are given up ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "timeout", "no time"])
async def test_a_wait_that_is_given_up_loses_nothing(how: str) -> None:
    """L41: data that is there wins over a timeout."""
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"a")
        for name, call in EXACT.items():
            if how == "cancel":
                async with blocked(lambda: call(conn), cancel=True):  # noqa: B023
                    pass
            else:
                conn.read_timeout = 0 if how == "no time" else 0.001
                await all_raise({name: call}, ReadTimeout, conn)
            assert conn.reader.buffered == 1
            conn.read_timeout = None
            async with blocked(lambda: call(conn)) as outcome:  # noqa: B023
                conn.read_timeout = 0
                await send_all(peer, b"b")
            if name == "peek":
                await conn.skip(2)
            assert outcome[0] in (None, b"ab", "ab", [b"ab"], [b"a", b"b"]) or len(outcome[0]) == 2
            await arrive(conn, peer, b"ab")
            await called(call, conn)  # without waiting it needs no time
            conn.read_timeout = None
            await conn.skip(len(conn.reader))
            await arrive(conn, peer, b"a")


# --- no read-ahead without bound before the first receive() --------------------------------------


@asynccontextmanager
async def made(how: str) -> AsyncIterator[tuple[Connection, socket.socket]]:
    """A connection that was made in some way, and its plain peer."""
    async with AsyncExitStack() as stack:
        if how in {"tcp", "unix"}:
            yield await stack.enter_async_context(opened(how))
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


@pytest.mark.parametrize("how", ["tcp", "unix", "serve", "accept", "dialled"])
async def test_no_read_ahead_without_bound_before_the_first_receive(how: str) -> None:
    """AnyIO's own accepted streams take 256 MiB from a peer before anybody has asked for a byte."""
    async with made(how) as (conn, peer):
        sent = await send_until_full(conn, peer, bytes(64 * MIB))
        assert sent < 32 * MIB
        assert 256 * KIB <= len(conn.reader) <= 512 * KIB
