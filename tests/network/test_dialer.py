"""Connecting, as AnyIO's functions do it, with deadlines."""

from __future__ import annotations

import errno
import functools
import gc
import inspect
import random
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSListener
from certificates import client_context, server_context
from peers import holds, pattern, within

import anypoll
from anypoll import Connection, ConnectTimeout, UNIXConnection
from anypoll._network import dialer

pytestmark = pytest.mark.anyio


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, int]]:
    """A plain listening socket and its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, 0))
        sock.listen(100)
        sock.settimeout(30)
        yield sock, sock.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]  # type: ignore[no-any-return]


@contextmanager
def silent(path: Path | None = None) -> Iterator[tuple[Any, socket.socket]]:
    """An address at which a connection is neither made nor refused: its backlog is full; and the
    socket that listens there.
    """
    family = socket.AF_INET if path is None else socket.AF_UNIX
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(family))
        sock.bind(("127.0.0.1", 0) if path is None else str(path))
        sock.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket(family))
            filler.setblocking(False)
            filler.connect_ex(sock.getsockname())
        yield sock.getsockname(), sock


def option(conn: Connection, level: int, name: int) -> int:
    return conn.extra(SocketAttribute.raw_socket).getsockopt(level, name)  # type: ignore[no-any-return]


# --- TCP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_connect_tcp(host: str) -> None:
    """L43."""
    with listening(host) as (sock, port):
        async with await anypoll.connect_tcp(host, port) as conn:
            assert type(conn) is Connection
            peer, address = sock.accept()
            with peer:
                assert conn.local_address == address[:2]
                assert conn.remote_address == (host, port)
                assert conn.extra(SocketAttribute.remote_port) == port
                assert conn.server is None
                assert conn.extra(SocketAttribute.raw_socket).gettimeout() == 0
                assert not option(conn, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                await conn.send(b"hello")
                assert peer.recv(100) == b"hello"


@pytest.mark.parametrize("host", [ip_address("127.0.0.1"), "localhost"])
async def test_other_forms_of_a_host(host: Any) -> None:
    with listening() as (_, port):
        async with await anypoll.connect_tcp(host, port) as conn:
            assert conn.remote_address == ("127.0.0.1", port)


async def test_refused(free_port: int) -> None:
    """O2."""
    with pytest.raises(OSError, match=r"^All connection attempts failed$") as caught:
        await anypoll.connect_tcp("127.0.0.1", free_port)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert caught.value.__cause__.errno == errno.ECONNREFUSED


async def test_refused_by_all(free_port: int, names: Any) -> None:
    names["both"] = [("::1", free_port), ("127.0.0.1", free_port)]
    with pytest.raises(OSError, match=r"^All connection attempts failed$") as caught:
        await anypoll.connect_tcp("both", free_port)
    cause = caught.value.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert [type(exc) for exc in cause.exceptions] == [ConnectionRefusedError] * 2


async def test_errors_are_those_of_anyio(free_port: int) -> None:
    targets = [
        ("127.0.0.1", free_port),
        ("no-such-host.invalid", 80),
        ("255.255.255.255", 80),  # unreachable for TCP, on every machine
    ]
    for host, port in targets:
        errors = []
        for connect in (anyio.connect_tcp, anypoll.connect_tcp):
            with pytest.raises(OSError, match=r"\w") as caught:
                await connect(host, port)
            errors.append(caught.value)
        theirs, ours = errors
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)
        assert type(ours.__cause__) is type(theirs.__cause__)
        if theirs.__cause__ is not None:
            assert ours.__cause__.errno == theirs.__cause__.errno  # type: ignore[union-attr]


async def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(OSError, match="All connection attempts failed") as caught:
        await anypoll.connect_tcp("fe80::1%no-such-interface", 80)
    assert isinstance(caught.value.__cause__, socket.gaierror)
    with pytest.raises(socket.gaierror):
        await anypoll.create_tcp_listener(local_host="fe80::1%no-such-interface")


async def test_a_failure_leaves_no_cycle(free_port: int) -> None:
    cause = None
    try:
        await anypoll.connect_tcp("127.0.0.1", free_port)
    except OSError as exc:
        cause = exc.__cause__
    assert cause is not None
    mine = "test_a_failure_leaves_no_cycle"
    others = [
        referrer
        for referrer in gc.get_referrers(cause)
        if not (inspect.isframe(referrer) and referrer.f_code.co_name == mine)
        and not (inspect.iscoroutine(referrer) and referrer.cr_code.co_name == mine)
    ]
    assert others == []


async def test_local_host_and_port(free_port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        local_port = sock.getsockname()[1]
    with listening() as (_, port):
        async with await anypoll.connect_tcp(
            "127.0.0.1", port, local_host="127.0.0.1", local_port=local_port
        ) as conn:
            assert conn.local_address == ("127.0.0.1", local_port)
        async with await anypoll.connect_tcp("127.0.0.1", port, local_host="127.0.0.2") as conn:
            assert conn.local_address[0] == "127.0.0.2"
        async with await anypoll.connect_tcp("127.0.0.1", port, local_port=free_port) as conn:
            assert conn.local_address == ("127.0.0.1", free_port)


async def test_a_local_host_that_is_not_ours() -> None:
    with listening() as (_, port), pytest.raises(OSError, match=r"\w") as caught:
        await anypoll.connect_tcp("127.0.0.1", port, local_host="192.0.2.1")
    assert " 192.0.2.1:0: " in str(caught.value.__cause__)


@pytest.mark.parametrize("keepalive", [True, anypoll.Keepalive(idle=9, interval=8, count=7)])
async def test_options_of_the_new_connection(keepalive: Any) -> None:
    with listening() as (_, port):
        async with await anypoll.connect_tcp(
            "127.0.0.1", port, read_timeout=3, write_timeout=4.5, keepalive=keepalive
        ) as conn:
            assert (conn.read_timeout, conn.write_timeout) == (3, 4.5)
            assert option(conn, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if keepalive is not True:
                assert option(conn, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 9


# --- deadlines and cancellation ------------------------------------------------------------------


async def test_connect_timeout() -> None:
    """Unless an outer scope ends first."""
    with silent() as (address, _):
        for timeout in (0.02, 0):
            with pytest.raises(ConnectTimeout):
                await within(anypoll.connect_tcp(*address, timeout=timeout))
        with anyio.move_on_after(0.02) as scope:
            await anypoll.connect_tcp(*address, timeout=30)
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.02):
            await anypoll.connect_tcp(*address, timeout=30)
        assert not isinstance(caught.value, ConnectTimeout)


async def test_a_time_out_of_the_kernel_is_no_connect_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def connect(_sock: Any, _address: Any) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(dialer, "connect", connect)
    with pytest.raises(OSError, match="All connection attempts failed") as caught:
        await anypoll.connect_tcp("127.0.0.1", 1, timeout=30)
    assert not isinstance(caught.value, ConnectTimeout)
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_cancelled_before_it_begins() -> None:
    with listening() as (_, port):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anypoll.connect_tcp("127.0.0.1", port)
        assert scope.cancelled_caught


@pytest.mark.parametrize("seed", range(3))
async def test_cancellation_closes_everything(seed: int, tmp_path: Path) -> None:
    """L18. At a random moment, over TCP and UNIX; what is left open the leak check finds."""
    random_ = random.Random(seed)

    async def connect(scope: anyio.CancelScope, address: Any) -> None:
        with scope:
            if isinstance(address, str):
                conn: Connection = await anypoll.connect_unix(address)
            else:
                conn = await anypoll.connect_tcp(*address)
            await conn.aclose()

    path = str(tmp_path / "socket")
    with listening() as (_, port), socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen(100)
        for address in [("127.0.0.1", port), ("localhost", port), path] * 8:
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                group.start_soon(connect, scope, address)
                for _ in range(random_.randrange(12)):
                    await anyio.sleep(0)
                scope.cancel()


async def test_the_winner_is_closed_when_cancelled_at_the_last_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After it has connected, and before it was handed over."""
    connect = dialer.connect
    connected: list[socket.socket] = []
    scope = anyio.CancelScope()

    async def connect_and_cancel(sock: socket.socket, address: Any) -> None:
        await connect(sock, address)
        connected.append(sock)
        scope.cancel()

    monkeypatch.setattr(dialer, "connect", connect_and_cancel)
    with listening() as (_, port):
        with scope:
            await anypoll.connect_tcp("127.0.0.1", port)
        assert scope.cancelled_caught
    [winner] = connected
    assert winner.fileno() == -1


# --- several addresses ---------------------------------------------------------------------------


async def test_the_next_address_after_a_refusal(names: Any) -> None:
    """At once, and not only after the delay."""
    with listening() as (_, port):
        names["host"] = [("::1", port), ("127.0.0.1", port)]
        with anyio.fail_after(30):
            async with await anypoll.connect_tcp("host", port, happy_eyeballs_delay=3600) as conn:
                assert conn.remote_address == ("127.0.0.1", port)


@pytest.mark.parametrize("silent_ones", [1, 2])
async def test_the_next_address_while_others_are_silent(names: Any, silent_ones: int) -> None:
    """The attempts go on side by side."""
    with listening() as (_, port), ExitStack() as stack:
        dead = [stack.enter_context(silent())[0] for _ in range(silent_ones)]
        names["host"] = [*dead, ("127.0.0.1", port)]
        connecting = anypoll.connect_tcp("host", port, happy_eyeballs_delay=0.01)
        async with await within(connecting) as conn:
            assert conn.remote_address == ("127.0.0.1", port)


async def test_ipv6_goes_first(names: Any) -> None:
    with listening("::1") as (_, port6), listening() as (_, port4):
        names["host"] = [("127.0.0.1", port4), ("::1", port6)]
        async with await anypoll.connect_tcp("host", 1, happy_eyeballs_delay=30) as conn:
            assert conn.remote_address == ("::1", port6)


async def test_a_timeout_ends_all_attempts(names: Any) -> None:
    with silent() as (first, _), silent() as (second, _):
        names["host"] = [first, second]
        with pytest.raises(ConnectTimeout):
            await within(anypoll.connect_tcp("host", 1, happy_eyeballs_delay=0.01, timeout=0.05))


async def test_the_local_host_restricts_the_family(names: Any) -> None:
    with listening() as (_, port):
        names["host"] = [("::1", port), ("127.0.0.1", port)]
        async with await anypoll.connect_tcp("host", port, local_host="127.0.0.1") as conn:
            assert conn.remote_address == ("127.0.0.1", port)


# --- UNIX ----------------------------------------------------------------------------------------


@pytest.fixture
def unix_path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(10)
        yield path


async def test_connect_unix(unix_path: Path) -> None:
    for path in (unix_path, str(unix_path), str(unix_path).encode()):
        async with await anypoll.connect_unix(
            path, timeout=30, read_timeout=1, write_timeout=2
        ) as conn:
            assert type(conn) is UNIXConnection
            assert conn.remote_address == str(unix_path)
            assert conn.local_address == ""
            assert (conn.read_timeout, conn.write_timeout) == (1, 2)
            assert conn.extra(SocketAttribute.remote_address) == str(unix_path)


async def test_keepalive_is_ignored_on_unix_sockets(unix_path: Path) -> None:
    async with await anypoll.connect_unix(unix_path, keepalive=True) as conn:
        assert not option(conn, socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_errors_of_connect_unix(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await anypoll.connect_unix(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "stale"))
    with pytest.raises(ConnectionRefusedError):
        await anypoll.connect_unix(tmp_path / "stale")


async def test_a_full_backlog(tmp_path: Path) -> None:
    """UNIX sockets say EAGAIN then; it is tried again, until the timeout or until there is room."""
    with silent(tmp_path / "socket") as (path, listening):
        with pytest.raises(ConnectTimeout):
            await within(anypoll.connect_unix(path, timeout=0.03))
        conns: list[Connection] = []

        async def connect() -> None:
            conns.append(await anypoll.connect_unix(path))

        async with anyio.create_task_group() as group:
            group.start_soon(connect)
            await anyio.sleep(0)
            assert conns == []
            listening.accept()[0].close()
            await holds(lambda: conns)
        await conns[0].aclose()


# --- TLS -----------------------------------------------------------------------------------------


@asynccontextmanager
async def tls_server() -> AsyncIterator[int]:
    """Echoes over TLS; both ends are ours."""

    async def echo(stream: Any) -> None:
        with suppress(anyio.BrokenResourceError):  # a client may leave without a word
            async with stream:
                async for piece in stream:
                    await stream.send(piece)

    plain = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    listener = TLSListener(plain, server_context())
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, echo)
        yield plain.extra(SocketAttribute.local_port)
        group.cancel_scope.cancel()


@pytest.mark.usefixtures("tls_way")
async def test_tls() -> None:
    async with (
        tls_server() as port,
        await anypoll.connect_tcp(
            "127.0.0.1", port, ssl_context=client_context(), timeout=30
        ) as stream,
    ):
        assert type(stream) is anypoll.TLSConnection
        assert type(stream.transport_stream) is Connection
        assert stream.extra(TLSAttribute.tls_version).startswith("TLS")
        assert stream.extra(SocketAttribute.remote_port) == port
        data = pattern(300_000)
        got = bytearray()
        async with anyio.create_task_group() as group:
            group.start_soon(stream.send, data)
            while len(got) < len(data):
                got += await within(stream.receive())
        assert got == data


async def test_tls_options(caplog: pytest.LogCaptureFixture) -> None:
    connect = functools.partial(anypoll.connect_tcp, "127.0.0.1")
    context = client_context()
    async with tls_server() as port:
        name = "anypoll.test"
        async with await connect(port, ssl_context=context, tls_hostname=name) as stream:
            await stream.send(b"x")
            assert await within(stream.receive()) == b"x"
        with pytest.raises(ssl.CertificateError):
            await connect(port, ssl_context=context, tls_hostname="elsewhere.example")
        with pytest.raises(ssl.SSLError):  # the default context trusts others
            await connect(port, tls=True)
        for compatible in (False, True):
            stream = await connect(port, ssl_context=context, tls_standard_compatible=compatible)
            assert stream.standard_compatible is compatible
            await within(stream.aclose())
            assert stream.transport_stream.fileno() == -1
    caplog.clear()  # the tracebacks of AnyIO's listener hold connections


@pytest.mark.usefixtures("tls_way")
async def test_a_tls_handshake_within_the_timeout() -> None:
    """A server that says nothing: the timeout covers the handshake too."""
    with listening() as (_, port):
        with pytest.raises(ConnectTimeout):
            await within(anypoll.connect_tcp("127.0.0.1", port, tls=True, timeout=0.1))
        with anyio.move_on_after(0.05) as scope:
            await anypoll.connect_tcp("127.0.0.1", port, tls=True)
        assert scope.cancelled_caught
