"""serve() and serve_forever(): entering, handling, counting, and all the ways to end."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import socket
import stat
import sys
import tempfile
import textwrap
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
)
from anyio._backends._asyncio import _task_states
from peers import (
    KIB,
    MIB,
    arrived,
    holds,
    pattern,
    read_all,
    read_to_end,
    reset,
    send_all,
    settle,
    within,
)
from programs import run_to_end
from serving import all_is_accounted_for, errors  # noqa: F401

import anypoll
from anypoll import Connection, MessageTooLarge, ReadTimeout, WriteTimeout

pytestmark = pytest.mark.anyio

HOST = "127.0.0.1"
local = functools.partial(anypoll.serve, host=HOST, port=0)


async def idle(conn: Connection) -> None:
    """Waits for what never comes."""
    await conn.reader.next(1)


async def echo(conn: Connection) -> None:
    try:
        while True:
            conn.writer.write(await conn.receive())
    except EndOfStream:
        pass


@asynccontextmanager
async def client(server: anypoll.Server) -> AsyncIterator[socket.socket]:
    """A plain non-blocking socket, connected to the server."""
    [address, *_] = server.addresses
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.connect(address)
        sock.setblocking(False)
        yield sock


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A path for UNIX sockets, which may not be long."""
    with tempfile.TemporaryDirectory(prefix="anypoll") as directory:
        yield Path(directory, "socket")


# --- what to serve -------------------------------------------------------------------------------


async def test_the_ten_lines() -> None:
    async with anypoll.serve(echo, host=HOST, port=0) as server:
        assert isinstance(server, anypoll.Server)
        assert server.port == server.addresses[0][1] > 0
        assert server.addresses == ((HOST, server.port),)
        async with await anypoll.connect_tcp(HOST, server.port) as conn:
            await conn.send(b"hello")
            assert await conn.next(5) == b"hello"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ValueError),
        ({"host": HOST}, None),  # port 0
        ({"port": 0, "path": "/nonexistent/x"}, ValueError),
        ({"host": HOST, "sock": 0}, ValueError),
        ({"path": "/nonexistent/x", "listeners": []}, ValueError),
        ({"port": -1}, ValueError),
        ({"port": 65536}, ValueError),
        ({"port": "http"}, TypeError),
        ({"port": 1.5}, TypeError),
        ({"port": 0, "backlog": "many"}, TypeError),
        ({"port": 0, "backlog": -1}, ValueError),
        ({"port": 0, "read_timeout": -1}, ValueError),
        ({"port": 0, "read_timeout": float("nan")}, ValueError),
        ({"port": 0, "write_timeout": "1"}, TypeError),
        ({"port": 0, "shutdown_timeout": -1}, ValueError),
        ({"port": 0, "shutdown_timeout": "1"}, TypeError),
        ({"port": 0, "keepalive": 5}, TypeError),
        ({"port": 0, "read_high_water": 0}, ValueError),
        ({"port": 0, "read_high_water": 1.5}, TypeError),
        ({"port": 0, "write_high_water": 0}, ValueError),
        ({"port": 0, "read_limit": 0}, ValueError),
        ({"port": 0, "read_limit": "1"}, TypeError),
        ({"path": "\0anypoll-mode", "path_mode": "rw"}, TypeError),
        ({"listeners": []}, ValueError),
        ({"sock": []}, ValueError),
        ({"listeners": 5}, ValueError),
        ({"listeners": ["x"]}, ValueError),
        ({"sock": "x"}, TypeError),
        ({"path": "/nonexistent/directory/socket"}, OSError),
        ({"path": "/" + "x" * 200}, OSError),
        ({"host": "192.0.2.1", "port": 0}, OSError),
    ],
)
async def test_misuse_is_told_on_entering(
    options: dict[str, Any], error: type[Exception] | None
) -> None:
    async with anypoll.serve(idle, host=HOST, port=0):
        pass  # what is only made once
    before = descriptors()
    server = anypoll.serve(idle, **options)  # not here
    if error is None:
        async with server:
            pass
    else:
        with pytest.raises(error):
            async with server:
                pytest.fail("it was entered")
    await holds(lambda: descriptors() == before)


@pytest.mark.parametrize("handler", [None, 5, "handler"])
async def test_a_server_needs_a_handler(handler: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        async with anypoll.serve(handler, host=HOST, port=0):
            pytest.fail("it was entered")


async def test_an_address_in_use() -> None:
    async with local(idle) as server:
        before = descriptors()
        with pytest.raises(OSError, match="in use"):
            async with anypoll.serve(idle, host=HOST, port=server.port):
                pytest.fail("it was entered")
        await holds(lambda: descriptors() == before)


async def test_all_interfaces() -> None:
    """One socket for both families, where there are both."""
    async with anypoll.serve(echo, port=0) as server:
        for host in (HOST, "::1"):
            try:
                sock = socket.create_connection((host, server.port))
            except OSError:
                assert host == "::1"  # this machine has no IPv6
                continue
            with sock:
                sock.setblocking(False)
                await send_all(sock, b"x")
                assert await read_all(sock, 1) == b"x"


async def test_a_name_with_two_addresses() -> None:
    async with anypoll.serve(echo, host="localhost", port=0) as server:
        assert len({address[1] for address in server.addresses}) == 1
        for listener, address in zip(server.listeners, server.addresses, strict=True):
            assert listener.extra(anyio.abc.SocketAttribute.local_address) == address
            with socket.create_connection(address):
                pass
        await holds(lambda: server.statistics().closed.get("done") == len(server.addresses))


@pytest.mark.parametrize("form", [str, os.fsencode, Path])
async def test_a_unix_socket(short_path: Path, form: Any) -> None:
    async with anypoll.serve(echo, path=form(str(short_path)), path_mode=0o600) as server:
        assert server.addresses == (str(short_path),)
        with pytest.raises(AttributeError):
            _ = server.port
        assert stat.S_IMODE(short_path.stat().st_mode) == 0o600
        async with client(server) as sock:
            await send_all(sock, b"x")
            assert await read_all(sock, 1) == b"x"
            [conn] = server.connections
            assert isinstance(conn, anypoll.UNIXConnection)


async def test_an_abstract_unix_socket() -> None:
    name = f"\0anypoll-test-{os.getpid()}"
    async with anypoll.serve(echo, path=name) as server:
        assert server.addresses == (name.encode(),)  # as AnyIO gives it
        async with client(server) as sock:
            await send_all(sock, b"x")
            assert await read_all(sock, 1) == b"x"


async def test_a_stale_socket_file_is_replaced(short_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(short_path))
    async with anypoll.serve(echo, path=short_path) as server, client(server):
        pass


async def test_no_other_file_is_ever_removed(short_path: Path) -> None:
    short_path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        async with anypoll.serve(echo, path=short_path):
            pytest.fail("it was entered")
    assert short_path.read_text() == "precious"


async def test_listeners_that_were_made_before() -> None:
    tcp = await anypoll.create_tcp_listener(local_host=HOST)
    other = await anypoll.create_tcp_listener(local_host=HOST)
    async with anypoll.serve(echo, listeners=[tcp, other]) as server:
        assert len(server.listeners) == len(server.addresses) == 2
        for address in server.addresses:
            with socket.create_connection(address) as sock:
                sock.setblocking(False)
                await send_all(sock, b"x")
                assert await read_all(sock, 1) == b"x"
    for address in server.addresses:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
    await tcp.aclose()
    await other.aclose()


async def test_a_closed_listener_cannot_be_served() -> None:
    listener = await anypoll.create_tcp_listener(local_host=HOST)
    await listener.aclose()
    with pytest.raises(ClosedResourceError):
        async with anypoll.serve(echo, listeners=listener):
            pytest.fail("it was entered")


@pytest.mark.parametrize("form", ["socket", "listening", "fd", "list"])
async def test_sockets_of_somebody_else(form: str) -> None:
    """Socket activation."""
    sock = socket.socket()
    sock.bind((HOST, 0))
    address = sock.getsockname()
    if form == "listening":
        sock.listen()
    given: Any = {"fd": sock.fileno(), "list": [sock]}.get(form, sock)
    async with anypoll.serve(echo, sock=given) as server:
        assert server.addresses == (address,)
        async with client(server) as peer:
            await send_all(peer, b"x")
            assert await read_all(peer, 1) == b"x"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    if form == "fd":
        sock.detach()


async def test_a_socket_that_is_not_bound() -> None:
    with socket.socket() as sock, pytest.raises(ValueError, match="bound"):
        async with anypoll.serve(echo, sock=sock):
            pytest.fail("it was entered")


async def test_port_sharing() -> None:
    async with (
        anypoll.serve(echo, host=HOST, port=0, reuse_port=True) as server,
        anypoll.serve(echo, host=HOST, port=server.port, reuse_port=True) as other,
    ):
        assert other.port == server.port


# --- what a handler gets -------------------------------------------------------------------------


async def test_the_options_reach_the_socket() -> None:
    keepalive = anypoll.Keepalive(idle=7, interval=3, count=2)
    for options, expected in (
        ({}, (1, 0)),
        ({"nodelay": False}, (0, 0)),
        ({"keepalive": True}, (1, 1)),
        ({"keepalive": keepalive}, (1, 1)),
    ):
        async with local(idle, **options) as server, client(server):
            await holds(lambda: server.connections)
            [conn] = server.connections
            sock = conn.extra(anyio.abc.SocketAttribute.raw_socket)
            assert bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) == expected[0]
            assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == expected[1]
            if options.get("keepalive") is keepalive:
                names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                assert [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [7, 3, 2]


async def test_a_connection_knows_its_server_and_its_addresses() -> None:
    """O26."""
    async with anypoll.serve(echo, port=0) as server:
        with socket.create_connection((HOST, server.port)) as sock:
            await holds(lambda: server.connections)
            [conn] = server.connections
            assert conn.server is server
            assert conn.state is None
            assert conn.local_address[1] == server.port
            assert conn.local_address[0].endswith(HOST)
            assert conn.remote_address[1] == sock.getsockname()[1]


async def test_what_came_before_the_handler() -> None:
    """L16, L10: the peer sends and closes before anybody looks."""
    seen = []

    async def handler(conn: Connection) -> None:
        await anyio.sleep(0.01)
        seen.append(await conn.reader.read_bytes(5))
        with pytest.raises(EndOfStream):
            await conn.reader.next(1)
        seen.append("end")

    async with local(handler) as server:
        async with client(server) as sock:
            await send_all(sock, b"hello")
        await holds(lambda: len(seen) == 2)
    assert seen == [b"hello", "end"]


@pytest.mark.parametrize("count", [200])
async def test_many_connections_at_once(count: int) -> None:
    """L14: no foreign byte. Each sends its own pattern, in its own rhythm."""

    async def talk(number: int) -> None:
        data = pattern(20_000 + 100 * number, number)
        async with client(server) as sock, anyio.create_task_group() as group:
            group.start_soon(send_all, sock, data)
            assert await read_all(sock, len(data)) == data
            sock.shutdown(socket.SHUT_WR)
            assert await read_all(sock, 1) == b""

    async with local(echo) as server, anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(talk, number)
    statistics = server.statistics()
    assert statistics.accepted == count
    assert statistics.closed == {"done": count}
    assert (
        statistics.bytes_received
        == statistics.bytes_sent
        == sum(20_000 + 100 * number for number in range(count))
    )


async def test_thousands_of_short_connections() -> None:
    """L13, L23, L32: connect, ask, get the answer, be closed; some just vanish."""
    rounds, workers = 250, 8

    async def handler(conn: Connection) -> None:
        conn.writer.write(await conn.reader.next(4))

    async def short(worker: int) -> None:
        for i in range(rounds):
            async with client(server) as sock:
                if i % 10 == 9:
                    reset(sock)
                    continue
                await send_all(sock, b"%4d" % i)
                assert await read_to_end(sock) == b"%4d" % i

    async with local(handler) as server:
        with anyio.fail_after(240):
            async with anyio.create_task_group() as group:
                for worker in range(workers):
                    group.start_soon(short, worker)
            await holds(lambda: not server.connections)
    statistics = server.statistics()
    assert statistics.handler_errors == statistics.active == 0
    assert statistics.closed["done"] >= rounds * workers * 9 // 10
    assert sum(statistics.closed.values()) == statistics.accepted


# --- how handlers end ----------------------------------------------------------------------------


async def test_an_exception_is_logged_once_and_stops_nobody(log: pytest.LogCaptureFixture) -> None:
    """L29, O28."""

    async def handler(conn: Connection) -> None:
        if await conn.reader.next(4) == b"fail":
            raise RuntimeError("no good")
        await echo(conn)

    async with local(handler) as server, client(server) as good:
        await send_all(good, b"good")
        for _ in range(3):
            async with client(server) as bad:
                await send_all(bad, b"fail")
                assert await read_to_end(bad) == b""
        await send_all(good, b"hello")
        assert await read_all(good, 5) == b"hello"
        await holds(lambda: server.statistics().handler_errors == 3)
        assert server.statistics().closed == {"error": 3}
    records = errors(log)
    assert [(r.name, r.levelname) for r in records] == [("anypoll.server", "ERROR")] * 3
    for record in records:
        assert record.exc_info is not None
        assert record.exc_info[0] is RuntimeError
        assert "no good" in logging.Formatter().format(record)
        assert "Traceback" in logging.Formatter().format(record)


async def not_found(conn: Connection) -> None:
    await conn.until(b"\n", max_bytes=1)


async def too_large(conn: Connection) -> None:
    await conn.next(65 * MIB)


async def incomplete(conn: Connection) -> None:
    await conn.next(100)


async def read_timeout(conn: Connection) -> None:
    conn.read_timeout = 0.01
    await conn.next(100)


async def write_timeout(conn: Connection) -> None:
    conn.write_timeout = 0.01
    await conn.send(bytes(32 * MIB))


async def closed(conn: Connection) -> None:
    await conn.aclose()
    await conn.next(1)


async def aborted(conn: Connection) -> None:
    conn.abort()
    conn.writer.write(b"x")


async def in_a_group(conn: Connection) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(conn.next, 100)


async def in_groups(conn: Connection) -> None:
    try:
        await conn.next(100)
    except IncompleteRead as exc:
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [exc]), exc]) from None


NORMAL = [
    (idle, b"", "eof"),
    (incomplete, b"abc", "incomplete"),
    (not_found, b"abc", "delimiter_not_found"),
    (too_large, b"", "message_too_large"),
    (read_timeout, b"", "read_timeout"),
    (write_timeout, b"", "write_timeout"),
    (closed, b"", "closed"),
    (aborted, b"", "closed"),
    (in_a_group, b"abc", "incomplete"),
    (in_groups, b"abc", "incomplete"),
]


@pytest.mark.parametrize(("handler", "sent", "reason"), NORMAL)
async def test_normal_ends_are_only_counted(
    handler: Any, sent: bytes, reason: str, log: pytest.LogCaptureFixture
) -> None:
    """A peer must not be able to fill the log."""
    async with local(handler) as server:
        async with client(server) as sock:
            await send_all(sock, sent)
            if "timeout" not in reason:
                sock.shutdown(socket.SHUT_WR)
            await holds(lambda: server.statistics().closed)
        assert server.statistics().closed == {reason: 1}
        assert server.statistics().handler_errors == 0
    debug = [r for r in log.records if r.name == "anypoll.server"]
    assert [r.levelname for r in debug] == ["DEBUG"]
    assert debug[0].exc_info is None


async def test_a_reset_is_a_normal_end() -> None:
    async with local(idle) as server:
        async with client(server) as sock:
            await holds(lambda: server.connections)
            reset(sock)
            await holds(lambda: server.statistics().closed)
        assert server.statistics().closed == {"broken": 1}


async def test_a_reset_during_a_write_is_a_normal_end() -> None:
    async def handler(conn: Connection) -> None:
        while True:
            await conn.send(bytes(MIB))

    async with local(handler) as server:
        async with client(server) as sock:
            await holds(lambda: arrived(sock) > 0)
            reset(sock)
            await holds(lambda: server.statistics().closed)
        assert server.statistics().closed == {"broken": 1}


class Unrelated(Exception):
    pass


FOREIGN = [
    EndOfStream(),
    IncompleteRead(),
    BrokenResourceError(),
    ClosedResourceError(),
    ReadTimeout(),
    WriteTimeout(),
    DelimiterNotFound(5),
    MessageTooLarge(),
    anypoll.IdleTimeout(),
    TimeoutError(),
    ConnectionResetError(),
]


@pytest.mark.parametrize("exc", FOREIGN, ids=lambda exc: type(exc).__name__)
async def test_the_same_exceptions_of_something_else_are_errors(
    exc: Exception, log: pytest.LogCaptureFixture
) -> None:
    async def handler(conn: Connection) -> None:
        raise exc

    async with local(handler) as server, client(server):
        await holds(lambda: server.statistics().handler_errors == 1)
    assert len(errors(log)) == 1
    exc.__traceback__ = None


@pytest.mark.parametrize("how", ["other connection", "mixed group", "raised from"])
async def test_errors_that_look_normal(how: str, log: pytest.LogCaptureFixture) -> None:
    """Another connection has ended, or it is not only this one."""

    async def handler(conn: Connection) -> None:
        if how == "other connection":
            one, other = anypoll.socketpair()
            async with one:
                await other.aclose()
                await one.next(1)
        try:
            await conn.next(1)
        except EndOfStream as exc:
            if how == "mixed group":
                raise ExceptionGroup("both", [exc, Unrelated()]) from None
            raise Unrelated from exc

    async with local(handler) as server:
        async with client(server):
            pass
        await holds(lambda: server.statistics().handler_errors == 1)
        assert server.statistics().closed == {"error": 1}
    assert len(errors(log)) == 1


async def test_a_connection_is_closed_when_its_handler_ends() -> None:
    kept: list[Connection] = []

    async def handler(conn: Connection) -> None:
        kept.append(conn)
        if await conn.next(1) == b"!":
            await conn.next(1)

    async with local(handler) as server:
        async with client(server) as sock:
            await send_all(sock, b"x")
            assert await read_to_end(sock) == b""
        async with client(server) as sock:
            await send_all(sock, b"!")
            sock.shutdown(socket.SHUT_WR)
            assert await read_to_end(sock) == b""
    for conn in kept:
        assert conn.fileno() == -1
        assert not conn.is_active
        with pytest.raises(ClosedResourceError):
            await conn.next(1)
        assert conn.statistics().bytes_received == 1
    kept.clear()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("sending", [False, True])
async def test_the_last_bytes_of_a_handler_arrive(
    kind: str, sending: bool, short_path: Path
) -> None:
    """Also to a slow peer, and also if that is still sending: a RST would destroy them."""
    data = pattern(MIB)

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        conn.writer.write(data)

    async def flood(sock: socket.socket) -> None:
        try:
            while True:
                await send_all(sock, bytes(64 * KIB))
                await anyio.lowlevel.checkpoint()  # a poller may discard it as fast as it comes
        except (BrokenPipeError, ConnectionResetError):
            pass

    where: dict[str, Any] = {"path": short_path} if kind == "unix" else {"host": HOST, "port": 0}
    async with (
        anypoll.serve(handler, **where) as server,
        client(server) as sock,
        anyio.create_task_group() as group,
    ):
        await send_all(sock, b"x")
        if sending:
            group.start_soon(flood, sock)
        await holds(lambda: arrived(sock) > 0)
        got = b""
        while len(got) < len(data):
            got += await read_all(sock, min(100_000, len(data) - len(got)))
            await anyio.sleep(0.001)
        assert got == data
        try:
            assert await read_all(sock, 1) == b""
        except ConnectionResetError:  # a UNIX socket's close with unread input, behind all data
            assert sending
            assert kind == "unix"
        group.cancel_scope.cancel()
    assert server.statistics().closed == {"done": 1}


async def test_a_peer_that_never_takes_the_last_bytes() -> None:
    """They get `write_timeout`, and then the connection is closed all the same."""

    async def handler(conn: Connection) -> None:
        conn.writer.write(bytes(32 * MIB))

    async with local(handler, write_timeout=0.05) as server, client(server):
        await holds(lambda: server.statistics().closed)
        assert server.statistics().active == 0


async def test_after_an_exception_nothing_is_drained(log: pytest.LogCaptureFixture) -> None:
    async def handler(conn: Connection) -> None:
        conn.writer.write(b"half an answer")
        raise Unrelated

    async with local(handler) as server, client(server) as sock:
        assert await read_to_end(sock) == b""
    assert len(errors(log)) == 1


async def test_a_handler_that_cancels_itself() -> None:
    async def handler(conn: Connection) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.next(1)
        conn.writer.write(b"done")

    async with local(handler) as server, client(server) as sock:
        assert await read_to_end(sock) == b"done"


# --- statistics ----------------------------------------------------------------------------------


async def test_statistics() -> None:
    async with local(echo) as server:
        nothing = server.statistics()
        assert isinstance(nothing, anypoll.ServerStatistics)
        assert (nothing.accepted, nothing.active, nothing.rejected) == (0, 0, 0)
        assert (nothing.handler_errors, nothing.closed) == (0, {})
        with pytest.raises((AttributeError, TypeError)):
            nothing.accepted = 5  # type: ignore[misc]
        with pytest.raises(TypeError):
            nothing.closed["x"] = 1  # type: ignore[index]
        async with client(server) as sock:
            await send_all(sock, b"hello")
            assert await read_all(sock, 5) == b"hello"
            now = server.statistics()
            assert (now.accepted, now.active) == (1, 1)
            assert (now.bytes_received, now.bytes_sent) == (5, 5)
            assert len(server.connections) == 1
            assert nothing.accepted == 0  # a snapshot
        await holds(lambda: not server.connections)
    after = server.statistics()
    assert (after.accepted, after.active, after.bytes_received, after.bytes_sent) == (1, 0, 5, 5)
    assert after.closed == {"done": 1}
    assert server.connections == ()
    assert server.port > 0


# --- leaving the block ---------------------------------------------------------------------------


async def test_an_exception_of_the_block_leaves_unchanged() -> None:
    async with local(idle) as server, client(server):
        pass  # what is only made once
    for exc in (
        ValueError("mine"),
        KeyboardInterrupt(),
        ExceptionGroup("my own", [ValueError("inside")]),
        BaseExceptionGroup("my own", [SystemExit(3)]),
        ExceptionGroup("my own", [ExceptionGroup("nested", [ValueError()])]),
        StopAsyncIteration(),
    ):
        with pytest.raises(BaseException) as caught:  # noqa: PT012
            async with local(idle) as server, client(server):
                await holds(lambda: server.connections)
                raise exc
        assert caught.value is exc
        assert exc.__cause__ is None
        assert server.connections == ()
        assert sum(server.statistics().closed.values()) == 1
        exc.__traceback__ = None
        del caught


async def test_an_exception_skips_the_grace() -> None:
    async def stubborn(conn: Connection) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(30), pytest.raises(Unrelated):  # noqa: PT012
        async with local(stubborn, shutdown_timeout=1e6) as server, client(server):
            await holds(lambda: server.connections)
            raise Unrelated
    assert server.statistics().closed == {"cancelled": 1}


async def test_a_cancellation_of_the_block() -> None:
    async def stubborn(conn: Connection) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(30):
        with anyio.CancelScope() as scope:
            async with local(stubborn, shutdown_timeout=1e6) as server, client(server):
                await holds(lambda: server.connections)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
    assert server.connections == ()
    assert server.shutting_down


async def test_a_cancellation_during_the_grace() -> None:
    cancelled = False

    async def stubborn(conn: Connection) -> None:
        nonlocal cancelled
        assert conn.server is not None
        await conn.server.wait_shutting_down()
        try:
            scope.cancel()
            await anyio.sleep_forever()
        finally:
            cancelled = True

    with anyio.fail_after(30):
        with anyio.CancelScope() as scope:
            async with local(stubborn, shutdown_timeout=1e6) as server, client(server):
                await holds(lambda: server.connections)
        assert scope.cancelled_caught
    assert server.connections == ()
    assert cancelled


async def test_leaving_at_once() -> None:
    async with local(idle) as server:
        pass
    assert server.shutting_down
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, server.port))


async def test_idle_connections_end_by_themselves() -> None:
    """L40: they see the end of the stream, and have the time for a last word."""
    ends: list[str] = []

    async def handler(conn: Connection) -> None:
        for method in ("next", "until", "peek", "skip", "next_parts", "receive"):
            await conn.reader.until(b"\n")
            conn.state = method
        try:
            await getattr(conn, conn.state)()
        except EndOfStream:
            ends.append("eof")

    async def waiting(conn: Connection) -> None:
        try:
            match await conn.reader.next(1):
                case b"u":
                    await conn.until(b"\n")
                case b"r":
                    await conn.receive()
                case b"p":
                    await conn.peek(1)
                case b"i":
                    assert await conn.reader.readinto(bytearray(5)) == 0
                    raise EndOfStream
                case _:
                    await conn.next(5)
        except EndOfStream:
            ends.append("eof")
            conn.writer.write(b"bye")

    socks: list[socket.socket] = []
    with anyio.fail_after(30):
        async with local(waiting, shutdown_timeout=1e6) as server:
            for mode in (b"u", b"r", b"p", b"i", b"n", b""):
                sock = socket.create_connection((HOST, server.port))
                sock.sendall(mode)
                sock.setblocking(False)
                socks.append(sock)
            await holds(lambda: len(server.connections) == 6)
            await holds(lambda: server.statistics().bytes_received == 5)
            await holds(lambda: all(not len(c.reader) for c in server.connections))
        for sock in socks:
            assert await read_to_end(sock) == b"bye"
            sock.close()
    assert ends == ["eof"] * 6
    assert server.statistics().closed == {"done": 6}


async def test_a_thousand_idle_connections_end() -> None:
    """L40."""
    async with local(idle, shutdown_timeout=1e6) as server:
        socks = [socket.create_connection((HOST, server.port)) for _ in range(300)]
        await holds(lambda: len(server.connections) == 300)
    assert server.statistics().closed == {"eof": 300}
    for sock in socks:
        assert sock.recv(1) == b""
        sock.close()


async def test_busy_connections_finish_their_work() -> None:
    """And are idle as soon as they wait with nothing buffered."""
    go_on = anyio.Event()
    busy = 0

    async def handler(conn: Connection) -> None:
        nonlocal busy
        while True:
            request = bytes(await conn.reader.until(b"\n"))
            busy += 1
            await go_on.wait()
            conn.writer.write(b"re: " + request)

    async with anyio.create_task_group() as group:
        with anyio.fail_after(30):
            async with local(handler, shutdown_timeout=1e6) as server:
                sock = socket.create_connection((HOST, server.port))
                sock.sendall(b"one\ntwo\n")
                sock.setblocking(False)
                await holds(lambda: busy == 1)

                async def release() -> None:
                    await server.wait_shutting_down()
                    await settle()
                    assert len(server.connections) == 1
                    go_on.set()

                group.start_soon(release)
        assert await read_to_end(sock) == b"re: one\nre: two\n"  # also what was buffered
        sock.close()
    assert server.statistics().closed == {"eof": 1}


async def test_half_a_message_is_not_idle() -> None:
    """Its rest may still come; without it the timeout ends it."""
    got = []

    async def handler(conn: Connection) -> None:
        got.append(bytes(await conn.reader.until(b"\n")))

    async with anyio.create_task_group() as group:
        async with local(handler, shutdown_timeout=1e6) as server:
            sock = socket.create_connection((HOST, server.port))
            sock.sendall(b"hal")
            await holds(lambda: server.statistics().bytes_received == 3)

            async def finish() -> None:
                await server.wait_shutting_down()
                await settle()
                sock.sendall(b"f\n")

            group.start_soon(finish)
        sock.close()
    assert got == [b"half\n"]


@pytest.mark.parametrize("timeout", [0, 0.05])
async def test_the_grace_is_limited(timeout: float) -> None:
    """O3."""
    cancelled = []

    async def stubborn(conn: Connection) -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.append(conn)
            raise

    with anyio.fail_after(30):
        async with local(stubborn, shutdown_timeout=timeout) as server, client(server):
            await holds(lambda: server.connections)
            await server.shutdown()
    assert len(cancelled) == 1
    assert server.statistics().closed == {"cancelled": 1}
    cancelled.clear()


async def test_connections_that_were_accepted_last(log: pytest.LogCaptureFixture) -> None:
    """Those of the backlog are reset, those that were accepted get a handler; none is lost."""
    socks = []
    with anyio.fail_after(30):
        async with local(idle) as server:
            socks += [socket.create_connection((HOST, server.port)) for _ in range(100)]
        for sock in socks:
            sock.setblocking(False)
            try:
                assert await read_to_end(sock) == b""
            except ConnectionResetError:
                pass
            sock.close()
    statistics = server.statistics()
    assert sum(statistics.closed.values()) == statistics.accepted
    assert statistics.active == 0


@pytest.mark.parametrize("mode", ["handler", "on_request", "on_disconnect"])
async def test_what_the_tasks_of_a_cancelled_handler_raise(
    mode: str, log: pytest.LogCaptureFixture
) -> None:
    """An error as any other; on Trio it stands beside the cancellation."""
    begun = anyio.Event()

    async def fail() -> None:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            raise Unrelated

    async def split(_conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(fail)
            await anyio.sleep_forever()

    handler: Any = {mode: split} if mode != "on_disconnect" else {mode: split, "handler": idle}
    async with local(**handler, shutdown_timeout=0) as server, client(server) as sock:
        if mode == "on_disconnect":
            await holds(lambda: server.connections)
            sock.close()
        else:
            sock.send(b"x")
        await within(begun.wait())
    assert server.statistics().handler_errors == 1
    assert [record.exc_info is not None for record in errors(log)] == [True]


@pytest.mark.parametrize(
    ("exc", "reason"),
    [(None, "eof"), (ValueError(), "cancelled"), (KeyboardInterrupt(), "cancelled")],
)
@pytest.mark.parametrize("how", ["waits", "has ended"])
async def test_leaving_in_another_task(
    exc: BaseException | None, reason: str, how: str, anyio_backend: tuple[str, Any]
) -> None:
    """The server ends as it would have, and what to do instead is said."""
    if how == "has ended" and anyio_backend[0] == "trio":
        pytest.skip("Trio lets no task end with a nursery open")

    async def stubborn(conn: Connection) -> None:
        await anyio.sleep_forever()

    block = local(idle if exc is None else stubborn)
    servers: list[anypoll.Server] = []
    left = anyio.Event()

    async def enter() -> None:
        servers.append(await block.__aenter__())
        if how == "waits":
            await left.wait()
            await block.__aexit__(None, None, None)  # or the task could not go on

    async def leave() -> None:
        await block.__aexit__(type(exc) if exc else None, exc, None)

    async with anyio.create_task_group() as tg:
        if how == "waits":
            tg.start_soon(enter)
            await holds(lambda: servers)
        else:
            task = asyncio.create_task(enter())
            await task
            del _task_states[task]  # which AnyIO would keep for ever, and the event loop with it
        [server] = servers
        async with client(server):
            await holds(lambda: server.connections)
            if isinstance(exc, KeyboardInterrupt):
                await leave()  # that goes on by itself
            else:
                with pytest.raises(RuntimeError, match=r"serve_forever\(\) in a task of its own"):
                    await leave()
        assert server.statistics().closed == {reason: 1}
        with pytest.raises(ConnectionRefusedError):
            async with client(server):
                pass
        left.set()


# --- shutdown() ----------------------------------------------------------------------------------


async def test_shutdown_within_the_block() -> None:
    """O3: it returns when everything is done."""
    async with local(idle) as server, client(server) as sock:
        await holds(lambda: server.connections)
        assert not server.shutting_down
        await server.shutdown()
        assert server.shutting_down
        assert server.connections == ()
        assert await read_to_end(sock) == b""
        await server.wait_shutting_down()
        await server.shutdown()  # again, and with a timeout
        await server.shutdown(0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, server.port))
    await server.shutdown()  # and after the end


async def test_shutdown_of_nothing() -> None:
    async with local(idle) as server:
        await server.shutdown()
    async with local(idle) as server, anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(server.shutdown)


@pytest.mark.parametrize("timeouts", [(None, 0.05), (0.05, None), (1e6, 0), (0, 1e6)])
async def test_the_shortest_timeout_decides(timeouts: tuple[float | None, float | None]) -> None:
    async def stubborn(conn: Connection) -> None:
        await anyio.sleep_forever()

    async with local(stubborn, shutdown_timeout=1e6) as server, client(server):
        await holds(lambda: server.connections)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(server.shutdown, timeouts[0])
                await server.wait_shutting_down()
                group.start_soon(server.shutdown, timeouts[1])
        assert server.connections == ()


@pytest.mark.parametrize("wrong", [-1, "1", float("nan")])
async def test_a_wrong_timeout_shuts_nothing_down(wrong: Any) -> None:
    async with local(echo) as server, client(server) as sock:
        with pytest.raises((TypeError, ValueError)):
            await server.shutdown(wrong)
        assert not server.shutting_down
        await send_all(sock, b"x")
        assert await read_all(sock, 1) == b"x"


async def test_a_handler_may_shut_its_server_down() -> None:
    """It is itself waited for, so its own call ends with the grace at the latest."""

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        assert conn.server is not None
        await conn.server.shutdown(0.05)

    with anyio.fail_after(30):
        async with local(handler, shutdown_timeout=1e6) as server, client(server) as sock:
            await send_all(sock, b"x")
            await server.wait_shutting_down()
            await server.shutdown()
    assert server.statistics().closed == {"cancelled": 1}


async def test_a_cancelled_shutdown_goes_on() -> None:
    async def stubborn(conn: Connection) -> None:
        await anyio.sleep_forever()

    async with local(stubborn, shutdown_timeout=1e6) as server, client(server):
        await holds(lambda: server.connections)
        async with anyio.create_task_group() as group:
            group.start_soon(server.shutdown)
            await server.wait_shutting_down()
            await settle()
            group.cancel_scope.cancel()
        assert server.shutting_down
        assert len(server.connections) == 1
        await within(server.shutdown(0))
        assert server.connections == ()


# --- serve_forever() -----------------------------------------------------------------------------


async def test_serving_in_a_task_group() -> None:
    async with anyio.create_task_group() as group:
        server = await group.start(
            functools.partial(anypoll.serve_forever, echo, host=HOST, port=0)
        )
        assert isinstance(server, anypoll.Server)
        async with client(server) as sock:
            await send_all(sock, b"x")
            assert await read_all(sock, 1) == b"x"
        group.cancel_scope.cancel()
    assert server.connections == ()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, server.port))


@pytest.mark.loops("trio")
async def test_serving_in_a_nursery() -> None:
    import trio

    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            functools.partial(anypoll.serve_forever, echo, host=HOST, port=0)
        )
        async with client(server) as sock:
            await send_all(sock, b"x")
            assert await read_all(sock, 1) == b"x"
        nursery.cancel_scope.cancel()
    assert server.connections == ()


async def test_serving_forever_ends_with_a_shutdown() -> None:
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            server = await group.start(
                functools.partial(anypoll.serve_forever, echo, host=HOST, port=0)
            )
            await server.shutdown()


async def test_serving_forever_tells_of_misuse() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        await anypoll.serve_forever(echo)
    async with anyio.create_task_group() as group:
        with pytest.raises(ValueError, match="exactly one"):
            await group.start(functools.partial(anypoll.serve_forever, echo))


# --- without descriptors -------------------------------------------------------------------------

STARVED = """
import asyncio, logging, os, resource, socket, sys
import anyio, anypoll

class Count(logging.Handler):
    records = []
    def emit(self, record):
        self.records.append(record)

logging.getLogger("anypoll.server").addHandler(Count())

async def echo(conn):
    async for data in conn:
        await conn.send(data)

async def main():
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        for episode in (1, 2):
            # the clients are made first, so that the server's ends are what is missing
            clients = [socket.socket() for _ in range(20)]
            in_use = max(map(int, os.listdir("/proc/self/fd")))
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 5, hard))
            for client in clients:
                client.connect(("127.0.0.1", server.port))
            with anyio.fail_after(30):
                while len(Count.records) < episode:
                    await anyio.sleep(0.01)
                assert len(server.connections) < 20
                await anyio.sleep(0.35)  # it tries again, without a word
            assert len(Count.records) == episode, Count.records
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            for client in clients:
                client.settimeout(30)
                client.sendall(b"x")
            with anyio.fail_after(30):
                for client in clients:
                    client.setblocking(False)
                    await anyio.wait_readable(client)
                    assert client.recv(1) == b"x"
                    client.close()
                while server.connections:
                    await anyio.sleep(0.01)
        assert all(r.levelname == "WARNING" for r in Count.records)
    used = sum(os.times()[:2])
    assert used < 10, used  # no busy loop
    print("recovered", len(Count.records))

backend, uvloop = sys.argv[1], sys.argv[2] == "uvloop"
anyio.run(main, backend=backend, backend_options={"use_uvloop": True} if uvloop else {})
"""


def test_a_listener_without_descriptors_recovers(
    anyio_backend: tuple[str, dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    """L35, O5: again and again, with one line in the log for each episode."""
    loop = "uvloop" if "uvloop" in request.node.name else "other"
    done = run_to_end(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(STARVED), anyio_backend[0], loop]
    )
    assert (done.stdout, done.stderr, done.returncode) == ("recovered 2\n", "", 0)


async def test_nothing_of_an_ended_connection_waits_for_the_garbage_collector() -> None:
    """No cycle leads to it from the exception of its end."""
    found: list[weakref.ref[Connection]] = []

    async def handler(conn: Connection) -> None:
        found.append(weakref.ref(conn))
        await conn.receive()  # EndOfStream

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        gc.collect()
        gc.disable()
        try:
            socket.create_connection(("127.0.0.1", server.port)).close()
            await holds(lambda: found and not server.connections)
            await holds(lambda: found[0]() is None)
        finally:
            gc.enable()
