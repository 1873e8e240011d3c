"""Sockets before they become connections or listeners: what is taken, hosts, and families."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from peers import within

import anypoll
from anypoll import Connection, SocketListener, UNIXConnection
from anypoll._connection import sockets
from anypoll._network import addresses, binding

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
    """L47."""
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


async def test_nodelay_is_set_however_a_connection_was_made() -> None:
    given, [_, other] = connected()
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        port = listener.extra(SocketAttribute.local_port)
        with other:
            async with (
                await Connection.from_socket(given) as made,
                await anypoll.connect_tcp("127.0.0.1", port) as dialled,
                await within(listener.accept()) as accepted,
            ):
                for conn in (made, dialled, accepted):
                    raw = conn.extra(SocketAttribute.raw_socket)
                    assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    assert raw.gettimeout() == 0


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
    assert addresses.with_scope(six, ("fe80::1%lo", 5)) == ("fe80::1", 5, 0, lo)
    assert addresses.with_scope(six, ("fe80::1%7", 5)) == ("fe80::1", 5, 0, 7)
    assert addresses.with_scope(six, ("::1", 5)) == ("::1", 5)
    assert addresses.with_scope(six, ("::1", 5, 0, 3)) == ("::1", 5, 0, 3)
    assert addresses.with_scope(socket.AF_INET, ("127.0.0.1", 5)) == ("127.0.0.1", 5)
    with pytest.raises(socket.gaierror, match="no interface 'nothing'"):
        addresses.with_scope(six, ("fe80::1%nothing", 5))


async def ignore(_conn: Connection) -> None:
    """A handler."""


NO_HOSTS = [
    *("", "a..b", ".a", "..", "a" * 64, f"{'a' * 64}.example", "a" * 300, "[::1]", "::1::"),
    *("\0", "127.0.0.1\0", "127.0.0.1\0.example", "localhost\0", "é\0"),
    *("é..b", ".é", "é" * 64, "xn--é", "-é", "\u200d.example", "☃", "\u3002", "\ud800", "\ud800.b"),
    *("::1%²", "fe80::1%٣", "fe80::1%é", "::1%\ud800", "fe80::1%\0", "::1%a\0b", "::1%a\0"),
    *("fe80::1%", "::1%lo%lo", "localhost%lo", "127.0.0.1%lo", "é%lo"),
    *("fe80::1%4294967296", "fe80::1%-1", "fe80::1%+1", "fe80::1% 1", f"fe80::1%{'a' * 300}"),
]


@pytest.mark.parametrize("host", NO_HOSTS, ids=ascii)
async def test_text_that_is_no_host(host: str) -> None:
    """`gaierror` from everything that takes a host. AnyIO lets a `UnicodeError` out of some of
    these, a group out of others, and connects to 127.0.0.1 for "127.0.0.1\\0.example".
    """
    calls: list[Callable[[], Any]] = [
        lambda: anypoll.connect_tcp(host, 1),
        lambda: anypoll.connect_tcp("127.0.0.1", 1, local_host=host),
        lambda: anypoll.connect_tcp("::1", 1, local_host=host),
        lambda: anypoll.create_tcp_listener(local_host=host),
        lambda: anypoll.create_tcp_listener(local_host=host, family=socket.AF_INET),
        lambda: anypoll.serve(ignore, host=host, port=0).__aenter__(),
    ]
    for call in calls:
        with pytest.raises(socket.gaierror):
            await call()
    with pytest.raises(anyio.ConnectionFailed) as caught:
        await anypoll.TCPConnectable(host, 1).connect()
    assert isinstance(caught.value.__cause__, socket.gaierror)


@pytest.mark.parametrize(
    ("host", "local_host"),
    [("127.0.0.1", "::1"), ("127.0.0.1", "fe80::1%1"), ("::1", "127.0.0.1"), ("nowhere", None)],
)
async def test_no_address_to_connect_to(
    host: str, local_host: str | None, names: dict[str, Any]
) -> None:
    """None of the family that is left; none at all, if Python was built without IPv6."""
    names["nowhere"] = []
    with pytest.raises(socket.gaierror):
        await anypoll.connect_tcp(host, 1, local_host=local_host)


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
        assert sockets.plain_address(address) == convert_ipv6_sockaddr(address)  # type: ignore[arg-type]


# --- one port for all addresses ------------------------------------------------------------------


async def test_an_ephemeral_port_that_is_taken_elsewhere_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first address gives the port, and somebody else has that on the second."""
    tries: list[int] = []
    bind_all = binding._bind_all

    def fail_twice(*args: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(98, "Address already in use")
        return bind_all(*args, **options)

    async def two(*_: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        return [(socket.AF_INET6, ("::1", 0)), (socket.AF_INET, ("127.0.0.1", 0))]

    monkeypatch.setattr(binding, "_bind_all", fail_twice)
    monkeypatch.setattr(binding, "_local_addresses", two)
    async with await anypoll.create_tcp_listener(local_host="both") as multi:
        ports = {each.extra(SocketAttribute.local_port) for each in multi.listeners}
        assert len(multi.listeners) == 2
        assert len(ports) == 1
    assert len(tries) >= 3  # more, if the port that it got was indeed taken


# --- families ------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL], ids=errno.errorcode.get)
def lacking(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, names: dict[str, Any]
) -> int:
    """A machine without IPv6: none in its kernel, or it is turned off."""
    error = OSError(request.param, os.strerror(request.param))

    class IPv4Socket(socket.socket):
        def __init__(self, family: int = -1, *args: Any, **options: Any) -> None:
            if family == socket.AF_INET6 and request.param == errno.EAFNOSUPPORT:
                raise error
            super().__init__(family, *args, **options)

        def bind(self, address: Any) -> None:
            if self.family == socket.AF_INET6:
                raise error
            super().bind(address)

    monkeypatch.setattr(socket, "socket", IPv4Socket)
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    names["both"] = [("::1", 0), ("127.0.0.1", 0)]
    names["six"] = [("::1", 0)]
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("host", ["both", None])
async def test_a_family_that_is_not_there_is_passed_over(lacking: int, host: str | None) -> None:
    async with await anypoll.create_tcp_listener(local_host=host) as multi:
        [listener] = multi.listeners
        assert listener.extra(SocketAttribute.family) == socket.AF_INET
    async with anypoll.serve(ignore, host=host, port=0) as server:
        assert len(server.addresses) == 1
        client = await anypoll.connect_tcp("both", server.port, local_host="both")
        async with client:
            assert client.local_address[0] == "127.0.0.1"


async def test_a_family_that_is_not_there_and_no_other(lacking: int) -> None:
    with pytest.raises(OSError, match=r"\[::1\]:0: ") as caught:
        await anypoll.create_tcp_listener(local_host="six")
    assert caught.value.errno == lacking
    with pytest.raises(OSError, match="All connection") as caught:
        await anypoll.connect_tcp("::1", 1, local_host="six")
    assert caught.value.__cause__.errno == lacking  # type: ignore[union-attr]


async def test_an_address_that_is_not_there_beside_others_of_its_family(names: Any) -> None:
    """That is a mistake, and no property of the machine."""
    names["two"] = [("127.0.0.1", 0), ("192.0.2.1", 0)]
    with pytest.raises(OSError, match=r"192\.0\.2\.1:\d+: ") as caught:
        await anypoll.create_tcp_listener(local_host="two")
    assert caught.value.errno == errno.EADDRNOTAVAIL


async def test_without_dual_stack_sockets_all_interfaces_are_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    async with anypoll.serve(ignore, port=0) as server:
        assert server.addresses == (("0.0.0.0", server.port), ("::", server.port))
        [_, six] = [each.extra(SocketAttribute.raw_socket) for each in server.listeners]
        assert six.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, server.port)).close()


async def test_names_are_looked_up_as_anyio_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class LookedUp(Exception):
        pass

    async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        raise LookedUp(host, port, options["family"], options["flags"])

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(anyio._core._sockets, "getaddrinfo", getaddrinfo)
    asked = []
    for create in (anyio.create_tcp_listener, anypoll.create_tcp_listener):
        with pytest.raises(LookedUp) as caught:
            await create(local_host="name", family=socket.AF_INET6, local_port=5)
        asked.append(caught.value.args)
    assert asked[0] == asked[1]


LOCALHOST = """\
import anyio, anypoll, socket, sys

async def ignore(conn):
    pass

async def main():
    async with anypoll.serve(ignore, host="localhost", port=0) as server:
        [(host, port)] = server.addresses
        assert host == "127.0.0.1"
        for options in ({}, {"local_host": "localhost"}, {"local_port": 0}):
            await (await anypoll.connect_tcp("localhost", port, **options)).aclose()
    async with await anypoll.create_tcp_listener(local_host="localhost") as multi:
        assert len(multi.listeners) == 1
    async with anypoll.serve(ignore, port=0) as server:
        socket.create_connection(("127.0.0.1", server.port)).close()

if sys.argv[1] == "trio":
    anyio.run(main, backend="trio")
else:
    anyio.run(main, backend_options={"use_uvloop": sys.argv[1] == "uvloop"})
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("addresses", ["127.0.0.1/8", "127.0.0.1/8 10.1.2.3/24"])
def test_localhost_in_a_container_without_ipv6(
    addresses: str, request: pytest.FixtureRequest, anyio_backend: Any, tmp_path: Path
) -> None:
    """Whose hosts file has an address of IPv6 all the same; only that of the loopback interface,
    where getaddrinfo() does not look at the families, and with one beside it.
    """
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("unshare (util-linux) or ip (iproute2) is not installed")
    (tmp_path / "hosts").write_text("::1 localhost\n127.0.0.1 localhost\n")
    (tmp_path / "program.py").write_text(LOCALHOST)
    container = ["unshare", "--map-root-user", "--mount", "--net", "sh", "-ec"]
    turned_off = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
    made = f"mount --bind {tmp_path}/hosts /etc/hosts; ip link set lo up"
    made += f"; [ ! -e {turned_off} ] || echo 1 >{turned_off}"
    made += "".join(f"; ip address replace {each} dev lo" for each in addresses.split())
    if subprocess.run([*container, made], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    loop = request.node.callspec.id.partition("-")[0]
    run = f'{made}; exec "$@"'
    command = [*container, run, "sh", sys.executable, str(tmp_path / "program.py"), loop]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
