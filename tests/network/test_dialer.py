"""Connecting, as AnyIO's functions do it, with deadlines."""

from __future__ import annotations

import errno
import gc
import inspect
import random
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSListener
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
def silent() -> Iterator[tuple[str, int]]:
    """An address at which a connection is neither made nor refused: its backlog is full."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket()
                fillers.append(filler)
                filler.setblocking(False)
                filler.connect_ex(sock.getsockname())
            yield sock.getsockname()
        finally:
            for filler in fillers:
                filler.close()


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
                raw = conn.extra(SocketAttribute.raw_socket)
                assert raw.gettimeout() == 0
                assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert not raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                await conn.send(b"hello")
                assert peer.recv(100) == b"hello"


async def test_connect_by_address_object() -> None:
    with listening() as (_, port):
        async with await anypoll.connect_tcp(ip_address("127.0.0.1"), port) as conn:
            assert conn.remote_address == ("127.0.0.1", port)


async def test_connect_by_name() -> None:
    with listening() as (_, port):
        async with await anypoll.connect_tcp("localhost", port) as conn:
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
            raw = conn.extra(SocketAttribute.raw_socket)
            assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if keepalive is not True:
                assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 9


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": -1}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"read_timeout": -1}, ValueError),
        ({"write_timeout": "1"}, TypeError),
        ({"keepalive": 7}, TypeError),
        ({"happy_eyeballs_delay": "1"}, TypeError),
        ({"happy_eyeballs_delay": -1}, ValueError),
    ],
)
async def test_nonsense(options: Any, error: type[Exception]) -> None:
    with listening() as (_, port), pytest.raises(error):
        await anypoll.connect_tcp("127.0.0.1", port, **options)


# --- deadlines and cancellation ------------------------------------------------------------------


@pytest.mark.parametrize("which", ["remote_port", "local_port"])
@pytest.mark.parametrize(
    ("port", "error"),
    [
        (-1, ValueError),
        (65536, ValueError),
        (10**30, ValueError),
        ("80", TypeError),
        (1.5, TypeError),
    ],
)
async def test_a_wrong_port_is_named(which: str, port: Any, error: type[Exception]) -> None:
    """By itself, and not as an `OverflowError` in a group of the attempts to connect."""
    ports = {"remote_port": 1, which: port}
    with pytest.raises(error, match=f"^{which} must be "):
        await anypoll.connect_tcp("127.0.0.1", **ports)


async def test_connect_timeout() -> None:
    with silent() as address:
        with pytest.raises(ConnectTimeout):
            await within(anypoll.connect_tcp(*address, timeout=0.02))
        with pytest.raises(ConnectTimeout):
            await anypoll.connect_tcp(*address, timeout=0)


async def test_an_outer_scope_wins() -> None:
    with silent() as address:
        with anyio.move_on_after(0.02) as scope:
            await anypoll.connect_tcp(*address, timeout=30)
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.02):
            await anypoll.connect_tcp(*address, timeout=30)
        assert not isinstance(caught.value, ConnectTimeout)


async def test_a_timeout_that_is_not_needed() -> None:
    with listening() as (_, port):
        async with await anypoll.connect_tcp("127.0.0.1", port, timeout=30):
            pass


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
    with listening() as (sock, port), socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen(100)
        for address in [("127.0.0.1", port), ("localhost", port), path] * 8:
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                group.start_soon(connect, scope, address)
                for _ in range(random_.randrange(12)):
                    await anyio.sleep(0)
                scope.cancel()
        sock.setblocking(False)


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


async def test_the_next_address_while_the_first_is_silent(names: Any) -> None:
    with listening() as (_, port), silent() as (dead_host, dead_port):
        names["host"] = [(dead_host, dead_port), ("127.0.0.1", port)]
        async with await within(
            anypoll.connect_tcp("host", port, happy_eyeballs_delay=0.01)
        ) as conn:
            assert conn.remote_address == ("127.0.0.1", port)


async def test_ipv6_goes_first(names: Any) -> None:
    with listening("::1") as (_, port6), listening() as (_, port4):
        names["host"] = [("127.0.0.1", port4), ("::1", port6)]
        async with await anypoll.connect_tcp("host", 1, happy_eyeballs_delay=30) as conn:
            assert conn.remote_address == ("::1", port6)


async def test_the_slow_first_address_may_still_win(names: Any) -> None:
    """The second is silent too: the attempts go on side by side."""
    with listening() as (_, port), silent() as first, silent() as second:
        names["host"] = [first, second, ("127.0.0.1", port)]
        async with await within(
            anypoll.connect_tcp("host", port, happy_eyeballs_delay=0.01)
        ) as conn:
            assert conn.remote_address == ("127.0.0.1", port)


async def test_a_timeout_ends_all_attempts(names: Any) -> None:
    with silent() as first, silent() as second:
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
        raw = conn.extra(SocketAttribute.raw_socket)
        assert not raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    with pytest.raises(TypeError, match="keepalive must be"):
        await anypoll.connect_unix(unix_path, keepalive=7)  # type: ignore[arg-type]


async def test_errors_of_connect_unix(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await anypoll.connect_unix(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "stale"))
    with pytest.raises(ConnectionRefusedError):
        await anypoll.connect_unix(tmp_path / "stale")


@pytest.mark.parametrize("kind", [socket.SOCK_RAW, socket.SOCK_DGRAM])
async def test_other_kinds_are_refused(unix_path: Path, kind: int) -> None:
    with pytest.raises(ValueError, match=socket.SocketKind(kind).name):
        await anypoll.connect_unix(unix_path, kind=kind)


async def test_a_full_backlog(tmp_path: Path) -> None:
    """UNIX sockets say EAGAIN then; it is tried again, until the timeout or until there is room."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen(0)
        fillers = []
        while True:
            filler = socket.socket(socket.AF_UNIX)
            filler.setblocking(False)
            fillers.append(filler)
            try:
                filler.connect(path)
            except BlockingIOError:
                break
        try:
            with pytest.raises(ConnectTimeout):
                await within(anypoll.connect_unix(path, timeout=0.03))
            async with anyio.create_task_group() as group:
                conns: list[Connection] = []

                async def connect() -> None:
                    conns.append(await anypoll.connect_unix(path))

                group.start_soon(connect)
                await anyio.sleep(0)
                assert conns == []
                sock.accept()[0].close()
                await holds(lambda: conns)
            await conns[0].aclose()
        finally:
            for filler in fillers:
                filler.close()


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory, foreign_env: dict[str, str]) -> Path:
    """A self-signed certificate for localhost and 127.0.0.1, and its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("certificate")
    command = [
        *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        *("-keyout", "key.pem", "-out", "certificate.pem"),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=directory, env=foreign_env)
    both = directory / "both.pem"
    both.write_bytes(
        (directory / "key.pem").read_bytes() + (directory / "certificate.pem").read_bytes()
    )
    return both


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def client_context(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate)


@asynccontextmanager
async def tls_server(certificate: Path) -> AsyncIterator[int]:
    """Echoes over TLS; both ends are ours."""

    async def echo(stream: Any) -> None:
        async with stream:
            async for piece in stream:
                await stream.send(piece)

    plain = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    listener = TLSListener(plain, server_context(certificate))
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, echo)
        yield plain.extra(SocketAttribute.local_port)
        group.cancel_scope.cancel()


async def test_tls(certificate: Path) -> None:
    async with (
        tls_server(certificate) as port,
        await anypoll.connect_tcp(
            "127.0.0.1", port, ssl_context=client_context(certificate), timeout=30
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


async def test_tls_hostname(certificate: Path) -> None:
    context = client_context(certificate)
    async with tls_server(certificate) as port:
        async with await anypoll.connect_tcp(
            "127.0.0.1", port, ssl_context=context, tls_hostname="localhost"
        ) as stream:
            await stream.send(b"x")
            assert await within(stream.receive()) == b"x"
        with pytest.raises(ssl.CertificateError):
            await anypoll.connect_tcp(
                "127.0.0.1", port, ssl_context=context, tls_hostname="elsewhere.example"
            )


async def test_tls_with_the_default_context_refuses_the_unknown(certificate: Path) -> None:
    async with tls_server(certificate) as port:
        with pytest.raises(ssl.SSLError):
            await anypoll.connect_tcp("127.0.0.1", port, tls=True)


@pytest.mark.parametrize("standard_compatible", [False, True])
async def test_tls_standard_compatible(certificate: Path, standard_compatible: bool) -> None:
    async with tls_server(certificate) as port:
        stream = await anypoll.connect_tcp(
            "127.0.0.1",
            port,
            ssl_context=client_context(certificate),
            tls_standard_compatible=standard_compatible,
        )
        assert stream.standard_compatible is standard_compatible
        await within(stream.aclose())
        assert stream.transport_stream.fileno() == -1


async def test_a_tls_handshake_within_the_timeout() -> None:
    """A server that says nothing: the timeout covers the handshake too."""
    with listening() as (_, port):
        with pytest.raises(ConnectTimeout):
            await within(anypoll.connect_tcp("127.0.0.1", port, tls=True, timeout=0.1))
        with anyio.move_on_after(0.05) as scope:
            await anypoll.connect_tcp("127.0.0.1", port, tls=True)
        assert scope.cancelled_caught
