"""serve() and serve_forever(): entering, handling, counting, and all the ways to end."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import socket
import stat
import weakref
from collections.abc import Awaitable, Callable
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
from serving import (
    FOR_EVER,
    HOST,
    all_is_accounted_for,  # noqa: F401
    client,
    connected,
    echo,
    ends,
    errors,
    is_served,
    local,
    stubborn,
)

import anypoll
from anypoll import Connection, MessageTooLarge, ReadTimeout, WriteTimeout

pytestmark = pytest.mark.anyio


class Unrelated(Exception):
    pass


async def idle(conn: Connection) -> None:
    """Waits for what never comes."""
    await conn.reader.next(1)


forever = functools.partial(anypoll.serve_forever, echo, host=HOST, port=0)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def nobody_listens(address: Any) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


# --- what to serve -------------------------------------------------------------------------------


async def test_the_ten_lines() -> None:
    async with local(echo) as server:
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
        ({"handler": None, "port": 0}, ValueError),
        ({"port": 0, "path": "/nonexistent/x"}, ValueError),
        ({"host": HOST, "sock": 0}, ValueError),
        ({"path": "/nonexistent/x", "listeners": []}, ValueError),
        ({"path": "/nonexistent/directory/socket"}, OSError),
        ({"path": "/" + "x" * 200}, OSError),
        ({"host": "192.0.2.1", "port": 0}, OSError),
    ],
)
async def test_misuse_is_told_on_entering(options: dict[str, Any], error: type[Exception]) -> None:
    """What is wrong with a single argument is told in test_bad_input.py."""
    async with anypoll.serve(idle, host=HOST):  # port 0, and what is only made once
        pass
    before = descriptors()
    server = anypoll.serve(**{"handler": idle} | options)  # not here
    with pytest.raises(error):
        async with server:
            pytest.fail("it was entered")
    await holds(lambda: descriptors() == before)


async def test_an_address_in_use() -> None:
    async with local(idle) as server:
        before = descriptors()
        with pytest.raises(OSError, match="in use"):
            async with anypoll.serve(idle, host=HOST, port=server.port):
                pytest.fail("it was entered")
        await holds(lambda: descriptors() == before)


@pytest.mark.parametrize("form", [str, os.fsencode, Path])
async def test_a_unix_socket(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "socket"
    async with anypoll.serve(echo, path=form(str(path)), path_mode=0o600) as server:
        assert server.addresses == (str(path),)
        with pytest.raises(AttributeError):
            _ = server.port
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with client(server) as sock:
            await is_served(sock)
            [conn] = server.connections
            assert isinstance(conn, anypoll.UNIXConnection)


async def test_an_abstract_unix_socket() -> None:
    name = f"\0anypoll-test-{os.getpid()}"
    async with anypoll.serve(echo, path=name) as server, client(server) as sock:
        assert server.addresses == (name.encode(),)  # as AnyIO gives it
        await is_served(sock)


async def test_listeners_that_were_made_before() -> None:
    made = [await anypoll.create_tcp_listener(local_host=HOST) for _ in range(2)]
    async with anypoll.serve(echo, listeners=made) as server:
        assert len(server.listeners) == len(server.addresses) == 2
        for listener, address in zip(server.listeners, server.addresses, strict=True):
            assert listener.extra(anyio.abc.SocketAttribute.local_address) == address
            with socket.create_connection(address) as sock:
                sock.setblocking(False)
                await is_served(sock)
    for address, listener in zip(server.addresses, made, strict=True):
        nobody_listens(address)
        await listener.aclose()
    with pytest.raises(ClosedResourceError):
        async with anypoll.serve(echo, listeners=made[0]):
            pytest.fail("it was entered")


@pytest.mark.parametrize("form", ["socket", "listening", "fd", "list"])
async def test_sockets_of_somebody_else(form: str) -> None:
    """Socket activation."""
    sock = socket.socket()
    with pytest.raises(ValueError, match="bound"):
        async with anypoll.serve(echo, sock=sock):
            pytest.fail("it was entered")
    sock.bind((HOST, 0))
    address = sock.getsockname()
    if form == "listening":
        sock.listen()
    given: Any = {"fd": sock.fileno(), "list": [sock]}.get(form, sock)
    async with anypoll.serve(echo, sock=given) as server, client(server) as peer:
        assert server.addresses == (address,)
        await is_served(peer)
    nobody_listens(address)
    if form == "fd":
        sock.detach()


async def test_port_sharing() -> None:
    async with (
        local(echo, reuse_port=True) as server,
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
        await holds(lambda: conn.statistics().bytes_received)
        seen.append(await conn.reader.read_bytes(5))
        with pytest.raises(EndOfStream):
            await conn.reader.next(1)
        seen.append("end")

    async with local(handler) as server:
        async with client(server) as sock:
            await send_all(sock, b"hello")
        await holds(lambda: len(seen) == 2)
    assert seen == [b"hello", "end"]


async def test_many_connections_at_once() -> None:
    """L14: no foreign byte. Each sends its own pattern, in its own rhythm."""
    count = 100

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
    total = sum(20_000 + 100 * number for number in range(count))
    assert statistics.bytes_received == statistics.bytes_sent == total


async def test_thousands_of_short_connections() -> None:
    """L13, L23, L32: connect, ask, get the answer, be closed; some just vanish."""
    rounds, workers = 60, 8

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
        text = logging.Formatter().format(record)
        assert "Traceback" in text
        assert "RuntimeError: no good" in text


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


async def never_silent(conn: Connection) -> None:
    while True:
        await conn.send(bytes(MIB))


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


#: What a handler does, what comes for it, what its peer does then, and the reason of its end.
NORMAL = [
    (idle, b"", "end", "eof"),
    (incomplete, b"abc", "end", "incomplete"),
    (not_found, b"abc", "end", "delimiter_not_found"),
    (too_large, b"", "end", "message_too_large"),
    (read_timeout, b"", "nothing", "read_timeout"),
    (write_timeout, b"", "nothing", "write_timeout"),
    (closed, b"", "end", "closed"),
    (aborted, b"", "end", "closed"),
    (in_a_group, b"abc", "end", "incomplete"),
    (in_groups, b"abc", "end", "incomplete"),
    (idle, b"", "reset", "broken"),
    (never_silent, b"", "reset", "broken"),
]


@pytest.mark.parametrize(("handler", "sent", "then", "reason"), NORMAL)
async def test_normal_ends_are_only_counted(
    handler: Any, sent: bytes, then: str, reason: str, log: pytest.LogCaptureFixture
) -> None:
    """A peer must not be able to fill the log."""
    async with local(handler) as server:
        async with client(server) as sock:
            await send_all(sock, sent)
            if then == "end":
                sock.shutdown(socket.SHUT_WR)
            elif then == "reset":
                await holds(lambda: server.connections and (handler is idle or arrived(sock)))
                reset(sock)
            await ends(server, **{reason: 1})
        assert server.statistics().handler_errors == 0
    debug = [r for r in log.records if r.name == "anypoll.server"]
    assert [r.levelname for r in debug] == ["DEBUG"]
    assert debug[0].exc_info is None


@pytest.mark.parametrize(
    "exc",
    [
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
        "other connection",
        "mixed group",
        "raised from",
    ],
    ids=lambda exc: exc if isinstance(exc, str) else type(exc).__name__,
)
async def test_errors_that_look_normal(exc: Exception | str, log: pytest.LogCaptureFixture) -> None:
    """It is something else that has ended so, or not only this connection."""

    async def handler(conn: Connection) -> None:
        if isinstance(exc, Exception):
            raise exc
        if exc == "other connection":
            one, other = anypoll.socketpair()
            async with one:
                await other.aclose()
                await one.next(1)
        try:
            await conn.next(1)
        except EndOfStream as end:
            if exc == "mixed group":
                raise ExceptionGroup("both", [end, Unrelated()]) from None
            raise Unrelated from end

    async with local(handler) as server:
        async with client(server):
            pass
        await ends(server, error=1)
        assert server.statistics().handler_errors == 1
    assert len(errors(log)) == 1
    if isinstance(exc, Exception):
        exc.__traceback__ = None


async def test_a_connection_is_closed_when_its_handler_ends() -> None:
    kept: list[Connection] = []

    async def handler(conn: Connection) -> None:
        kept.append(conn)
        if await conn.next(1) == b"!":
            await conn.next(1)

    async with local(handler) as server:
        for sent in (b"x", b"!"):  # it returns, it raises
            async with client(server) as sock:
                await send_all(sock, sent)
                if sent == b"!":
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
async def test_the_last_bytes_of_a_handler_arrive(kind: str, sending: bool, tmp_path: Path) -> None:
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

    where: dict[str, Any] = (
        {"path": tmp_path / "s"} if kind == "unix" else {"host": HOST, "port": 0}
    )
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
        await holds(lambda: server.statistics().closed and not server.connections)


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
            await is_served(sock, b"hello")
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


async def test_a_cancellation_during_the_grace() -> None:
    cancelled = False

    async def cancels(conn: Connection) -> None:
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
            async with local(cancels, shutdown_timeout=FOR_EVER) as server, client(server):
                await holds(lambda: server.connections)
        assert scope.cancelled_caught
    assert server.connections == ()
    assert cancelled


async def test_leaving_at_once() -> None:
    async with local(idle) as server:
        pass
    assert server.shutting_down
    nobody_listens((HOST, server.port))


async def test_idle_connections_end_by_themselves() -> None:
    """L40: they see the end of the stream, and have the time for a last word."""
    ended: list[bytes] = []
    waits: dict[bytes, Callable[[Connection], Awaitable[Any]]] = {
        b"n": lambda conn: conn.next(5),
        b"u": lambda conn: conn.until(b"\n"),
        b"r": lambda conn: conn.receive(),
        b"p": lambda conn: conn.peek(1),
        b"i": lambda conn: conn.reader.readinto(bytearray(5)),
        b"": lambda conn: conn.next(1),
    }

    async def waiting(conn: Connection) -> None:
        mode = b""
        try:
            mode = bytes(await conn.reader.next(1))
            assert await waits[mode](conn) == 0
        except EndOfStream:
            assert mode != b"i"
        ended.append(mode)
        conn.writer.write(b"bye")

    with anyio.fail_after(30):
        async with local(waiting, shutdown_timeout=FOR_EVER) as server:
            socks = [connected(server) for _ in waits]
            for sock, mode in zip(socks, waits, strict=True):
                sock.sendall(mode)
            await holds(lambda: len(server.connections) == 6)
            await holds(lambda: server.statistics().bytes_received == 5)
            await holds(lambda: all(not len(c.reader) for c in server.connections))
        for sock in socks:
            assert await read_to_end(sock) == b"bye"
            sock.close()
    assert sorted(ended) == sorted(waits)
    assert server.statistics().closed == {"done": 6}


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
            async with local(handler, shutdown_timeout=FOR_EVER) as server:
                sock = connected(server)
                sock.sendall(b"one\ntwo\n")
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
        async with local(handler, shutdown_timeout=FOR_EVER) as server:
            sock = connected(server)
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

    async def handler(conn: Connection) -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.append(conn)
            raise

    with anyio.fail_after(30):
        async with local(handler, shutdown_timeout=timeout) as server, client(server):
            await holds(lambda: server.connections)
            await server.shutdown()
    assert len(cancelled) == 1
    assert server.statistics().closed == {"cancelled": 1}
    cancelled.clear()


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
        nobody_listens((HOST, server.port))
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
        nobody_listens((HOST, server.port))
    await server.shutdown()  # and after the end


async def test_shutdown_of_nothing() -> None:
    for times in (1, 5):
        async with local(idle) as server, anyio.create_task_group() as group:
            for _ in range(times):
                group.start_soon(server.shutdown)


@pytest.mark.parametrize("timeouts", [(None, 0.05), (0.05, None), (FOR_EVER, 0), (0, FOR_EVER)])
async def test_the_shortest_timeout_decides(timeouts: tuple[float | None, float | None]) -> None:
    async with local(stubborn, shutdown_timeout=FOR_EVER) as server, client(server):
        await holds(lambda: server.connections)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(server.shutdown, timeouts[0])
                await server.wait_shutting_down()
                group.start_soon(server.shutdown, timeouts[1])
        assert server.connections == ()


async def test_a_handler_may_shut_its_server_down() -> None:
    """It is itself waited for, so its own call ends with the grace at the latest."""

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        assert conn.server is not None
        await conn.server.shutdown(0.05)

    with anyio.fail_after(30):
        async with local(handler, shutdown_timeout=FOR_EVER) as server, client(server) as sock:
            await send_all(sock, b"x")
            await server.wait_shutting_down()
            await server.shutdown()
    assert server.statistics().closed == {"cancelled": 1}


async def test_a_cancelled_shutdown_goes_on() -> None:
    async with local(stubborn, shutdown_timeout=FOR_EVER) as server, client(server):
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


@pytest.mark.parametrize("how", ["cancelled", "shutdown"])
async def test_serving_in_a_task_group(how: str) -> None:
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            server = await group.start(forever)
            assert isinstance(server, anypoll.Server)
            async with client(server) as sock:
                await is_served(sock)
            if how == "cancelled":
                group.cancel_scope.cancel()
            else:
                await server.shutdown()
    assert server.connections == ()
    nobody_listens((HOST, server.port))


async def test_serving_forever_tells_of_misuse() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        await anypoll.serve_forever(echo)
    async with anyio.create_task_group() as group:
        with pytest.raises(ValueError, match="exactly one"):
            await group.start(functools.partial(anypoll.serve_forever, echo))


async def test_nothing_of_an_ended_connection_waits_for_the_garbage_collector() -> None:
    """No cycle leads to it from the exception of its end."""
    found: list[weakref.ref[Connection]] = []

    async def handler(conn: Connection) -> None:
        found.append(weakref.ref(conn))
        await conn.receive()  # EndOfStream

    async with local(handler) as server:
        gc.collect()
        gc.disable()
        try:
            socket.create_connection(("127.0.0.1", server.port)).close()
            await holds(lambda: found and not server.connections)
            await holds(lambda: found[0]() is None)
        finally:
            gc.enable()
