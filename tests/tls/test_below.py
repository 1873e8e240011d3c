"""The connection below a session of the core: nobody gets past the session."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from inspect import isawaitable
from typing import Any

import anyio
import pytest
from anyio import BusyResourceError, ClosedResourceError
from peers import opened
from tls_peers import Peer, accepted, both, in_core

from anypoll import TLSConnection, _epoll

pytestmark = [pytest.mark.anyio, in_core]


@asynccontextmanager
async def a_session() -> AsyncIterator[tuple[TLSConnection, Peer]]:
    async with opened() as (conn, sock):
        peer = Peer(sock)
        tls = await accepted(conn, peer)
        await tls.send(b"ready")
        assert await peer.receive(5) == b"ready"
        try:
            yield tls, peer
        finally:
            tls.abort()


async def on_request(_stream: Any) -> None:
    raise AssertionError("nobody calls this")


#: All that would get something from the socket, or put something on it.
USES: dict[str, Callable[[Any], Any]] = {
    "receive": lambda conn: conn.receive(),
    "send": lambda conn: conn.send(b"plain"),
    "next": lambda conn: conn.next(1),
    "until": lambda conn: conn.until(b"x"),
    "peek": lambda conn: conn.reader.peek(1),
    "peek_nowait": lambda conn: conn.reader.peek_nowait(1),
    "write": lambda conn: conn.writer.write(b"plain"),
    "flush": lambda conn: conn.writer.flush(),
    "send_eof": lambda conn: conn.send_eof(),
    "detach": lambda conn: conn.detach(),
    "set_on_request": lambda conn: conn.set_on_request(on_request),
    "send_fds": lambda conn: conn.send_fds(b"plain", [0]),
    "receive_fds": lambda conn: conn.receive_fds(10, 1),
}


async def used(use: str, conn: Any) -> None:
    result = USES[use](conn)
    if isawaitable(result):
        await result


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("input_waits", [False, True])
async def test_is_busy(use: str, input_waits: bool) -> None:
    async with a_session() as (tls, peer):
        if input_waits:
            await peer.send(b"secret and more")
            await tls.reader.peek(15)
        sent = tls.statistics().bytes_sent
        with anyio.fail_after(10), pytest.raises(BusyResourceError):
            await used(use, tls.connection)
        assert tls.statistics().bytes_sent == sent
        if not input_waits:
            await peer.send(b"secret and more")
        assert await tls.next(15) == b"secret and more"
        await tls.send(b"after all")
        assert await peer.receive(9) == b"after all"


@pytest.mark.parametrize("use", USES)
async def test_is_closed_with_the_session(use: str) -> None:
    async with a_session() as (tls, _peer):
        tls.abort()
        with pytest.raises(ClosedResourceError):
            await used(use, tls.connection)


async def test_can_be_used_again_behind_the_session() -> None:
    async with a_session() as (tls, peer):

        async def end() -> None:
            assert await peer.receive(1) == b""  # the close_notify
            peer.sock.send(peer.close_notify() + b"plain")

        got: list[Any] = []

        async def unwrap() -> None:
            got.append(await tls.unwrap())

        await both(end, unwrap)
        [(conn, rest)] = got
        assert rest == b"plain"
        await conn.send_fds(b"x", [peer.sock])
        message, fds, _flags, _address = socket.recv_fds(peer.sock, 10, 1)
        os.close(*fds)
        assert message == b"x"


async def test_the_core_refuses_it_too() -> None:
    async with a_session() as (tls, peer):
        await peer.send(b"secret")
        await tls.reader.peek(6)
        handle = tls.connection._core.handle
        with pytest.raises(OSError, match="busy"):
            _epoll.take_fds(handle, 0, 10, 10)
        assert _epoll.send_fds(handle, b"plain", [0]) == -16
        assert _epoll.conn_shutdown(handle) == -16
        assert _epoll.conn_detach(handle, 0) == -16
        assert await tls.next(6) == b"secret"
