"""Sockets before they become connections or listeners: what is taken, and IPv6 scopes."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from peers import within

import anypoll
from anypoll import Connection, SocketListener, UNIXConnection, _sockets

pytestmark = pytest.mark.anyio

# --- from_socket() -------------------------------------------------------------------------------

Made = tuple[Any, list[socket.socket]]


def held(sock: socket.socket, *others: socket.socket) -> Made:
    return sock, [sock, *others]


def by_number(make: Callable[[], Made]) -> Made:
    given, kept = make()
    return given.fileno(), kept


def connected(family: int = socket.AF_INET) -> Made:
    if family == socket.AF_UNIX:
        return held(*socket.socketpair())
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = socket.create_connection(server.getsockname())
        return held(first, server.accept()[0])


def bound(kind: int) -> Made:
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    return held(sock)


def closed() -> Made:
    sock = socket.socket()
    sock.close()
    return held(sock)


def listening() -> Made:
    return held(socket.create_server(("127.0.0.1", 0)))


def pipe() -> Made:
    reading, writing = os.pipe()
    os.close(writing)
    return reading, []


WRONG: dict[str, Callable[[], Made]] = {
    "a str": lambda: ("socket", []),
    "bytes": lambda: (b"socket", []),
    "None": lambda: (None, []),
    "a float": lambda: (3.5, []),
    "a negative number": lambda: (-1, []),
    "a number that is not open": lambda: (1_000_000, []),
    "a pipe": pipe,
    "a closed socket": closed,
    "an unconnected socket": lambda: held(socket.socket()),
    "a datagram socket": lambda: bound(socket.SOCK_DGRAM),
    "a pair of datagram sockets": lambda: held(*socket.socketpair(type=socket.SOCK_DGRAM)),
}
WRONG_AS_NUMBERS = {
    f"{name}, by its number": functools.partial(by_number, make)
    for name, make in WRONG.items()
    if "unconnected" in name or "datagram" in name
}


async def complaint(cls: Any, make: Callable[[], Made]) -> str:
    given, kept = make()
    still_open = [sock.fileno() for sock in kept]
    with pytest.raises((TypeError, ValueError)) as caught:
        await cls.from_socket(given)
    assert [sock.fileno() for sock in kept] == still_open  # they stay the caller's
    for sock in kept:
        if sock.fileno() >= 0:
            os.fstat(sock.fileno())
        sock.close()
    if isinstance(given, int) and not kept and 0 <= given < 1_000_000:
        os.close(given)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("make", [*WRONG.values(), *WRONG_AS_NUMBERS.values()])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Connection, anyio.abc.SocketStream),
        (UNIXConnection, anyio.abc.UNIXSocketStream),
        (SocketListener, anyio.abc.SocketListener),
    ],
    ids=["Connection", "UNIXConnection", "SocketListener"],
)
async def test_from_socket_complains_as_anyio_does(ours: Any, theirs: Any, make: Any) -> None:
    assert await complaint(ours, make) == await complaint(theirs, make)


@pytest.mark.parametrize("as_number", [False, True])
async def test_a_connection_is_no_listener_and_the_other_way_round(as_number: bool) -> None:
    for cls, make, message in (
        (SocketListener, connected, "ValueError: the socket must not be connected"),
        (Connection, listening, "ValueError: the socket must be connected"),
    ):
        each: Any = functools.partial(by_number, make) if as_number else make
        assert await complaint(cls, each) == message


async def test_other_families_are_refused() -> None:
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError:
        pytest.skip("this kernel has no other stream family at hand")
    with sock, pytest.raises(ValueError, match="must be"):
        await Connection.from_socket(sock)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["listener", "serve", "dialled", "from_socket"])
async def test_nodelay_is_set_however_a_connection_was_made(of: str) -> None:
    async def is_set(conn: Connection) -> None:
        raw = conn.extra(SocketAttribute.raw_socket)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert raw.gettimeout() == 0
        seen.append(conn)

    seen: list[Connection] = []
    if of == "from_socket":
        given, [_, other] = connected()
        with other:
            async with await Connection.from_socket(given) as conn:
                await is_set(conn)
    elif of == "serve":
        async with anypoll.serve(is_set, host="127.0.0.1", port=0) as server:
            conn = await anypoll.connect_tcp("127.0.0.1", server.port)
            async with conn:
                with pytest.raises(anyio.EndOfStream):
                    await within(conn.receive())
    else:
        async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
            [listener] = multi.listeners
            port = listener.extra(SocketAttribute.local_port)
            client = await anypoll.connect_tcp("127.0.0.1", port)
            async with client, await within(listener.accept()) as conn:
                await is_set(conn if of == "listener" else client)
    assert len(seen) == 1


# --- scopes --------------------------------------------------------------------------------------


def link_local() -> str:
    """A link-local address of this machine, with its interface."""
    with open("/proc/net/if_inet6") as table:
        for line in table:
            digits, _, _, scope, _, name = line.split()
            if scope == "20":
                return f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))}%{name}"
    pytest.skip("no interface has a link-local address")


@pytest.mark.parametrize("numeric", [False, True])
async def test_link_local_addresses_with_a_scope(numeric: bool) -> None:
    host, _, name = link_local().partition("%")
    index = socket.if_nametoindex(name)
    where = f"{host}%{index if numeric else name}"
    async with await anypoll.create_tcp_listener(local_host=where) as multi:
        [listener] = multi.listeners
        address = (f"{host}%{index}", listener.extra(SocketAttribute.local_port))
        assert listener.extra(SocketAttribute.local_address) == address
        client = await anypoll.connect_tcp(where, address[1])
        async with client, await within(listener.accept()) as conn:
            assert client.remote_address == conn.local_address == address
            assert client.local_address == conn.remote_address
            assert client.local_address[0] == f"{host}%{index}"
            for each in (client, conn):
                theirs = anyio.abc.SocketStream.extra_attributes.fget(each)  # type: ignore[attr-defined]
                remote = theirs[SocketAttribute.remote_address]()
                assert each.extra(SocketAttribute.remote_address) == remote
        async with await anypoll.connect_tcp(where, address[1], local_host=where) as client:
            assert client.local_address[0] == f"{host}%{index}"


async def test_serve_on_a_scope() -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"hello")

    host = link_local()
    async with anypoll.serve(handler, host=host, port=0) as server:
        assert server.addresses[0][0].startswith(host.partition("%")[0] + "%")
        async with await anypoll.connect_tcp(host, server.port) as conn:
            assert await within(conn.next(5)) == b"hello"


def test_with_scope() -> None:
    lo = socket.if_nametoindex("lo")
    six = socket.AF_INET6
    assert _sockets.with_scope(six, ("fe80::1%lo", 5)) == ("fe80::1", 5, 0, lo)
    assert _sockets.with_scope(six, ("fe80::1%7", 5)) == ("fe80::1", 5, 0, 7)
    assert _sockets.with_scope(six, ("::1", 5)) == ("::1", 5)
    assert _sockets.with_scope(six, ("::1", 5, 0, 3)) == ("::1", 5, 0, 3)
    assert _sockets.with_scope(socket.AF_INET, ("127.0.0.1", 5)) == ("127.0.0.1", 5)
    with pytest.raises(socket.gaierror, match="no interface 'nothing'"):
        _sockets.with_scope(six, ("fe80::1%nothing", 5))


def test_plain_addresses_are_anyios() -> None:
    from anyio._core._sockets import convert_ipv6_sockaddr

    for address in (
        ("127.0.0.1", 5),
        ("::1", 5, 0, 0),
        ("fe80::1", 5, 0, 3),
        ("fe80::1%eth0", 5, 0, 3),
        "/a/path",
        "",
    ):
        assert _sockets.plain_address(address) == convert_ipv6_sockaddr(address)  # type: ignore[arg-type]


# --- one port for all addresses ------------------------------------------------------------------


async def test_an_ephemeral_port_that_is_taken_elsewhere_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first address gives the port, and somebody else has that on the second."""
    tries: list[int] = []
    bind_all = _sockets._bind_all

    def fail_twice(*args: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(98, "Address already in use")
        return bind_all(*args, **options)

    async def two(*_: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        return [(socket.AF_INET6, ("::1", 0)), (socket.AF_INET, ("127.0.0.1", 0))]

    monkeypatch.setattr(_sockets, "_bind_all", fail_twice)
    monkeypatch.setattr(_sockets, "_local_addresses", two)
    async with await anypoll.create_tcp_listener(local_host="both") as multi:
        ports = {each.extra(SocketAttribute.local_port) for each in multi.listeners}
        assert len(multi.listeners) == 2
        assert len(ports) == 1
    assert len(tries) >= 3  # more, if the port that it got was indeed taken
