"""Connectables: AnyIO's, and whatever takes those, with our connections behind them."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStreamConnectable, SocketAttribute
from anyio.streams.buffered import BufferedConnectable
from anyio.streams.tls import TLSConnectable, TLSListener
from certificates import client_context, server_context
from peers import within

import anypoll
from anypoll import Connection, TCPConnectable, UNIXConnectable, UNIXConnection

pytestmark = pytest.mark.anyio


@contextmanager
def listening(address: Any) -> Iterator[socket.socket]:
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(family) as sock:
        sock.bind(address)
        sock.listen()
        yield sock


@pytest.mark.parametrize("host", ["127.0.0.1", ip_address("127.0.0.1")])
async def test_tcp(host: Any) -> None:
    with listening(("127.0.0.1", 0)) as sock:
        connectable = TCPConnectable(host, sock.getsockname()[1])
        for _ in range(2):  # it can be used again
            async with await connectable.connect() as conn:
                assert type(conn) is Connection
                assert conn.remote_address == sock.getsockname()


@pytest.mark.parametrize("make", [str, Path, os.fsencode, lambda _: "\0anypoll connectable"])
async def test_unix(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "socket"
    with listening(make(path) if type(make(path)) in (str, bytes) else str(path)):
        async with await UNIXConnectable(make(path)).connect() as conn:
            assert type(conn) is UNIXConnection


def test_constructors_are_those_of_anyio() -> None:
    for ours, theirs in (
        (TCPConnectable, anyio.TCPConnectable),
        (UNIXConnectable, anyio.UNIXConnectable),
    ):
        assert issubclass(ours, theirs)
        assert issubclass(ours, ByteStreamConnectable)
        names = [field.name for field in dataclasses.fields(theirs)]
        assert [field.name for field in dataclasses.fields(ours)] == names
        assert ours.__module__ == "anypoll"
    one, other = TCPConnectable(host="h", port=1), TCPConnectable("h", 2)
    assert one == TCPConnectable("h", 1)
    assert one != other
    assert repr(one) == "TCPConnectable(host='h', port=1)"
    assert UNIXConnectable(path="p").path == "p"
    assert anyio.as_connectable(one) is one


async def test_failures_are_those_of_anyio(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket() as sock:  # bound and not listening: refuses
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        for ours, theirs in (
            (TCPConnectable("127.0.0.1", port), anyio.TCPConnectable("127.0.0.1", port)),
            (UNIXConnectable(str(path)), anyio.UNIXConnectable(str(path))),
            (UNIXConnectable(path), anyio.UNIXConnectable(path)),
        ):
            errors = []
            for connectable in (theirs, ours):
                with pytest.raises(anyio.ConnectionFailed) as caught:
                    await connectable.connect()
                errors.append(caught.value)
            assert type(errors[0].__cause__) is type(errors[1].__cause__)
            assert isinstance(errors[1].__cause__, OSError)
            assert str(errors[0]) == str(errors[1])


async def test_a_cancelled_connect_is_no_failure() -> None:
    with listening(("127.0.0.1", 0)) as sock, anyio.CancelScope() as scope:
        scope.cancel()
        await TCPConnectable("127.0.0.1", sock.getsockname()[1]).connect()
        pytest.fail("the call did not see the cancellation")


async def test_anyios_tls_and_buffered_connectables_take_ours(tmp_path: Path) -> None:
    path = tmp_path / "socket"

    async def echo(stream: Any) -> None:
        async with stream:
            async for piece in stream:
                await stream.send(piece)

    tcp = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    unix = await anypoll.create_unix_listener(path)
    async with tcp, unix, anyio.create_task_group() as group:
        for plain in (tcp, unix):
            listener = TLSListener(plain, server_context())
            group.start_soon(listener.serve, echo)
        port = tcp.extra(SocketAttribute.local_port)
        for connectable in (TCPConnectable("127.0.0.1", port), UNIXConnectable(path)):
            secure = TLSConnectable(
                connectable, hostname="anypoll.test", ssl_context=client_context()
            )
            async with await within(BufferedConnectable(secure).connect()) as stream:
                await stream.send(b"through all layers")
                assert await within(stream.receive_exactly(18)) == b"through all layers"
        group.cancel_scope.cancel()


async def test_a_failed_handshake_closes_the_connection() -> None:
    with listening(("127.0.0.1", 0)) as sock:
        connectable = TCPConnectable("127.0.0.1", sock.getsockname()[1])
        secure = TLSConnectable(connectable, hostname="peer", ssl_context=client_context())
        async with anyio.create_task_group() as group:
            group.start_soon(secure.connect)
            await anyio.wait_readable(sock)
            peer, _ = sock.accept()
            with peer:
                await anyio.wait_readable(peer)  # the client's hello: the handshake has begun
                group.cancel_scope.cancel()
        # that nothing is left open is seen after each test
